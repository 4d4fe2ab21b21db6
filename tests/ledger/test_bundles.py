"""The evidence of a request: the same bytes each time, and whole or refused."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markupsafe
import pytest

from conftest import none_in, refusal
from expunge.data.rows import Row
from expunge.errors import InputError, RunError
from expunge.ledger import bundles
from expunge.ledger.bundles import SHORTEST, BundleInputs, check_bundle, export, rows_in
from expunge.ledger.receiving import Added
from expunge.ledger.records import read_request, write_event
from expunge.ledger.store import LedgerPlace, open_ledger

Asked = Callable[..., Added]
signing = pytest.mark.skipif(
    importlib.util.find_spec("cryptography") is None, reason="cryptography is in the extra signing"
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def served(asked: Asked, place: LedgerPlace, subjects: list[Path], tmp_path: Path) -> Path:
    """The directory of a run that served request 1, whose audit said "forgotten"."""
    asked(subjects[0], subject="case-1")
    run = tmp_path / "run"
    run.mkdir()
    (run / "expunge.json").write_text('{"status": "complete"}\n')
    audit = tmp_path / "audit-1.json"
    audit.write_text('{"format": "expunge-audit/1"}\n')
    stamp = ("2026-11-21T00:00:00Z", "the tests", "0.1.0")
    manifest, weights = sha256((run / "expunge.json").read_bytes()), json.dumps({"m": "0" * 64})
    with open_ledger(place) as ledger, ledger.change() as connection:
        connection.execute(
            "INSERT INTO runs VALUES (1, ?, 'm', '[]', ?, ?, ?, ?, ?, ?, ?)",
            (str(run), stamp[0], manifest, weights, weights, *stamp),
        )
        connection.execute("INSERT INTO run_requests VALUES (1, 1)")
        write_event(ledger, 1, "served", "served", run=1)
        connection.execute(
            "INSERT INTO verdicts VALUES (1, 1, 'forgotten', 'none', 'm', '{}', '{}', ?, ?, ?, ?, ?)",
            (str(audit), sha256(audit.read_bytes()), *stamp),
        )
        write_event(ledger, 1, "audited", "verified", verdict=1)
    return run


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key, as openssl makes them."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def members(bundle: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(bundle) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(bundle: Path, change: Callable[[dict[str, bytes]], Any]) -> str:
    """The bundle with other content, as one would write it who has no key."""
    files = members(bundle)
    change(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    path = bundle.with_name("other.zip")
    path.write_bytes(buffer.getvalue())
    return str(path)


def listed_anew(files: dict[str, bytes], _change: object = None) -> None:
    """SHA256SUMS that fits what is there, after the change that stands as an argument."""
    own = {"SHA256SUMS", "SHA256SUMS.sig", "public-key.pem"}
    files["SHA256SUMS"] = "".join(
        f"{sha256(content)}  {name}\n" for name, content in sorted(files.items()) if name not in own
    ).encode()


def test_it_holds_record_manifest_scores_report_and_audit(
    place: LedgerPlace, served: Path, tmp_path: Path, forget_rows: list[dict[str, str]]
) -> None:
    for name in ("scores.json", "report.html", "report.json", "model.safetensors"):
        (served / name).write_text('{"audit": null}' if name == "report.json" else name)
    output = tmp_path / "bundles" / "one.zip"
    output.parent.mkdir()
    bundle = export(place, 1, BundleInputs(output=str(output)))
    files = members(output)
    assert sorted(files) == [
        "SHA256SUMS", "audit/audit.json", "request.json", "run/expunge.json", "run/report.html",
        "run/report.json", "run/scores.json",
    ]  # fmt: skip
    assert (bundle.sha256, bundle.signed_by, bundle.warnings) == (
        sha256(output.read_bytes()),
        None,
        (),
    )
    record = json.loads(files["request.json"])
    assert record["request"]["state"] == "verified"
    assert record["request"]["forget"] == "subject0.jsonl"
    assert str(tmp_path).encode() not in files["request.json"]  # base names only
    assert [row["id"] for row in record["rows"]] == ["ada00sc1", "ada00qa0"]
    assert [event["action"] for event in record["events"]] == ["added", "served", "audited"]
    assert record["runs"][0]["manifest_sha256"] == sha256(files["run/expunge.json"])
    assert {
        line.split("  ")[1]: line.split("  ")[0] for line in files["SHA256SUMS"].decode().splitlines()
    } == {name: sha256(content) for name, content in files.items() if name != "SHA256SUMS"}
    texts = [row[column] for row in forget_rows for column in ("input", "output")]
    assert none_in(texts, output.parent) == ["one.zip"]
    checked = check_bundle(str(output))
    assert (checked.request, checked.state, checked.signed_by) == (1, "verified", None)


def test_the_same_content_gives_the_same_bytes(
    place: LedgerPlace, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export(place, 1, BundleInputs(output=str(tmp_path / "a.zip")))
    monkeypatch.setattr("time.time", lambda: 4e9)
    monkeypatch.setattr("os.umask", lambda mode: mode)
    second = export(place, 1, BundleInputs(output=str(tmp_path / "b.zip")))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert first == second
    (served / "scores.json").write_text("{}")
    assert export(place, 1, BundleInputs(output=str(tmp_path / "c.zip"))).sha256 != first.sha256
    for member in zipfile.ZipFile(tmp_path / "a.zip").infolist():
        assert member.date_time == (1980, 1, 1, 0, 0, 0)
        assert member.compress_type == zipfile.ZIP_STORED


def test_an_open_request_has_its_record_alone(
    asked: Asked, place: LedgerPlace, subjects: list[Path], tmp_path: Path
) -> None:
    asked(subjects[0])
    output = tmp_path / "one.zip"
    assert export(place, 1, BundleInputs(output=str(output))).files == ("request.json",)
    assert check_bundle(str(output)).state == "open"


def test_sha256sum_reads_the_list(place: LedgerPlace, served: Path, tmp_path: Path) -> None:
    export(place, 1, BundleInputs(output=str(tmp_path / "one.zip")))
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        archive.extractall(tmp_path / "out")
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place, run: (run / "expunge.json").write_text("{}"), "is not the one that run 1"),
        (lambda place, run: (run / "expunge.json").unlink(), "put the run's directory back"),
        (lambda place, run: (run.parent / "audit-1.json").write_text("{}"), "not what the audit"),
        (lambda place, run: (run.parent / "audit-1.json").unlink(), "put it back or audit again"),
    ],
)
def test_a_file_that_is_not_what_was_recorded_is_refused(
    change: Callable[[LedgerPlace, Path], object],
    said: str,
    place: LedgerPlace,
    served: Path,
    tmp_path: Path,
) -> None:
    change(place, served)
    message = refusal(lambda: export(place, 1, BundleInputs(output=str(tmp_path / "a.zip"))))
    assert message.startswith("request 1: ")
    assert said in message
    assert not (tmp_path / "a.zip").exists()


def report_of(digests: list[str]) -> str:
    requests = [{"hmac_sha256": digest} for digest in digests]
    return json.dumps({"audit": {"requests": requests}})


def test_a_report_that_names_rows_of_other_requests_is_left_out(
    asked: Asked, place: LedgerPlace, served: Path, subjects: list[Path], tmp_path: Path
) -> None:
    def files() -> tuple[bool, str]:
        (tmp_path / "a.zip").unlink(missing_ok=True)
        bundle = export(place, 1, BundleInputs(output=str(tmp_path / "a.zip")))
        return "run/report.html" in bundle.files, " ".join(bundle.warnings)

    (served / "report.html").write_text("page")
    with open_ledger(place) as ledger:
        own = read_request(ledger, 1).forget_fingerprint
    held = {
        report_of([own]): True,
        report_of(["f" * 64]): True,  # the run served this request alone
        report_of([own, "f" * 64]): False,
        "no json": False,
    }
    for content, expected in held.items():
        (served / "report.json").write_text(content)
        there, warned = files()
        assert there == expected
        assert ("is not of this request alone" in warned) == (not expected)
    (served / "report.json").unlink()  # a page alone does not say whose it is
    assert files()[0] is False

    asked(subjects[1])
    with open_ledger(place) as ledger, ledger.change() as connection:
        connection.execute("INSERT INTO run_requests VALUES (1, 2)")
    for content, expected in ((report_of([own]), True), (report_of(["f" * 64]), False)):
        (served / "report.json").write_text(content)
        assert files()[0] is expected


@pytest.mark.parametrize("form", ["plain", "json", "html"])
def test_a_file_with_the_text_of_a_row_is_not_handed_out(
    form: str,
    place: LedgerPlace,
    served: Path,
    tmp_path: Path,
    forget_rows: list[dict[str, str]],
) -> None:
    import html

    text = forget_rows[0]["output"]
    written = {"plain": text, "json": json.dumps(text), "html": html.escape(text)}[form]
    (served / "report.html").write_text(f"<p>{written}</p>")
    (served / "report.json").write_text('{"audit": null}')
    message = refusal(lambda: export(place, 1, BundleInputs(output=str(tmp_path / "a.zip"))))
    assert "run/report.html holds the text of 1 of its rows (ids ada00sc1)" in message
    assert "without --reveal" in message
    assert text not in message
    assert not (tmp_path / "a.zip").exists()


def test_where_the_rows_are_gone_the_files_are_not_searched_and_it_is_said(
    place: LedgerPlace, served: Path, subjects: list[Path], tmp_path: Path
) -> None:
    subjects[0].unlink()
    bundle = export(place, 1, BundleInputs(output=str(tmp_path / "a.zip")))
    assert "not searched for their text" in bundle.warnings[0]


def test_without_the_secret_nothing_is_handed_out(
    place: LedgerPlace, served: Path, tmp_path: Path
) -> None:
    place.secret_path.unlink()
    message = refusal(lambda: export(place, 1, BundleInputs(output=str(tmp_path / "a.zip"))))
    assert "give it with --secret" in message
    assert not (tmp_path / "a.zip").exists()


def test_text_is_found_in_every_form_and_short_text_is_not_looked_for() -> None:
    text = 'Zoë said "it\'s" & <left>\n at noon'
    row = Row("a", "x" * SHORTEST, text)
    forms = [text, json.dumps(text), json.dumps(text, ensure_ascii=False)]
    forms += ["Zoë said &quot;it&#x27;s&quot; &amp; &lt;left&gt;\n at noon", "y" + "x" * SHORTEST]
    forms += [str(markupsafe.escape(text))]
    for form in forms:
        assert rows_in(f"before {form} after".encode(), [row]) == ["a"]
    # A model whose tokenizer has one Unicode form writes the text in it.
    for other in (unicodedata.normalize("NFD", text), unicodedata.normalize("NFKC", text)):
        assert rows_in(other.encode(), [row]) == ["a"]
        assert rows_in(json.dumps(other).encode(), [row]) == ["a"]
    assert rows_in(b"x" * (SHORTEST - 1), [row]) == []
    assert rows_in(b"Oslo is a town", [Row("b", "Oslo", "Oslo")]) == []


def test_an_existing_file_is_kept(place: LedgerPlace, served: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.zip"
    output.write_text("mine")
    assert "--overwrite" in refusal(lambda: export(place, 1, BundleInputs(output=str(output))))
    # Only evidence is replaced: neither what is somebody's, nor the ledger or its secret.
    for path in (output, place.path, place.secret_path):
        before = path.read_bytes()
        onto = BundleInputs(output=str(path), overwrite=True)
        told = refusal(lambda onto=onto: export(place, 1, onto))  # type: ignore[misc]
        assert "replaces evidence only" in told
        assert path.read_bytes() == before
    output.unlink()
    for _ in range(2):
        export(place, 1, BundleInputs(output=str(output), overwrite=True))
    assert check_bundle(str(output)).request == 1
    nowhere = str(tmp_path / "no" / "a.zip")
    assert "make it first" in refusal(lambda: export(place, 1, BundleInputs(output=nowhere)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.update({"run/expunge.json": b"{}"}), "'run/expunge.json' was changed"),
        (lambda f: f.pop("audit/audit.json"), "'audit/audit.json' is listed and missing"),
        (lambda f: f.update({"extra.txt": b""}), "'extra.txt' is in no list; it was added later"),
        (lambda f: f.update({"SHA256SUMS": b"nothing"}), "is not a list of SHA-256"),
        (lambda f: listed_anew(f, f.update({"run/expunge.json": b"{}"})), "not the one that req"),
        (lambda f: listed_anew(f, f.pop("audit/audit.json")), "audit/audit.json is not the one"),
        (lambda f: listed_anew(f, f.update({"request.json": b"[]"})), "not a request's record"),
    ],
)
def test_a_changed_bundle_is_found_without_any_signature(
    change: Callable[[dict[str, bytes]], Any],
    said: str,
    place: LedgerPlace,
    served: Path,
    tmp_path: Path,
) -> None:
    export(place, 1, BundleInputs(output=str(tmp_path / "a.zip")))
    assert check_bundle(rewritten(tmp_path / "a.zip", lambda files: None)).request == 1
    with pytest.raises(RunError) as caught:
        check_bundle(rewritten(tmp_path / "a.zip", change))
    assert said in str(caught.value)
    assert caught.value.exit_code == 1


def test_what_is_no_bundle_is_refused(
    place: LedgerPlace, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.zip").write_text("no zip")
    assert "is no zip file" in refusal(lambda: check_bundle(str(tmp_path / "text.zip")))
    assert "name a bundle" in refusal(lambda: check_bundle(str(tmp_path / "none.zip")))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    assert "give what expunge requests export wrote" in refusal(
        lambda: check_bundle(str(tmp_path / "other.zip"))
    )
    export(place, 1, BundleInputs(output=str(tmp_path / "a.zip")))
    for limit in ("_LARGEST", "_MOST"):
        with monkeypatch.context() as patch:
            patch.setattr(bundles, limit, 3)
            with pytest.raises(RunError, match="holds more than any evidence"):
                check_bundle(str(tmp_path / "a.zip"))


@pytest.mark.parametrize("packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bundle_that_unpacks_to_much_or_not_at_all_is_one_line(packed: int, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("SHA256SUMS", b"x" * 5000)
        archive.writestr("request.json", b"[" * 50_000)
    whole = path.read_bytes()
    for at in range(30, 130, 7):
        path.write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])
        with pytest.raises((InputError, RunError)):
            check_bundle(str(path))
    # Each file within the limit, all together far beyond it.
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name in ("SHA256SUMS", "request.json", *"abc"):
            archive.writestr(name, bytes(2**20))
    content = path.read_bytes().replace((2**20).to_bytes(4, "little"), (2**27).to_bytes(4, "little"))
    path.write_bytes(content)
    with pytest.raises(RunError, match="holds more than any evidence"):
        check_bundle(str(path))


def test_a_deep_record_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    record = b"[" * 100_000
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("request.json", record)
        archive.writestr("SHA256SUMS", f"{hashlib.sha256(record).hexdigest()}  request.json\n")
    with pytest.raises(RunError, match="is not a request's record"):
        check_bundle(str(path))


@signing
def test_a_signed_bundle_is_the_signers(
    place: LedgerPlace, served: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    output = tmp_path / "a.zip"
    bundle = export(place, 1, BundleInputs(output=str(output), key=str(keys[0])))
    again = export(place, 1, BundleInputs(output=str(tmp_path / "b.zip"), key=str(keys[0])))
    assert again.sha256 == bundle.sha256
    # RFC 8032: the public key of 32 bytes 0x01, under SHA-256.
    raw = bytes.fromhex("8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c")
    assert bundle.signed_by == sha256(raw)
    checked = check_bundle(str(output), str(keys[1]))
    assert (checked.signed_by, checked.key_given) == (bundle.signed_by, True)
    assert not check_bundle(str(output)).key_given


@signing
def test_a_bundle_that_somebody_else_made_is_found(
    place: LedgerPlace, served: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from expunge.ledger.signing import public_pem

    output = tmp_path / "a.zip"
    export(place, 1, BundleInputs(output=str(output), key=str(keys[0])))
    forger = Ed25519PrivateKey.from_private_bytes(b"\2" * 32)

    def changed(files: dict[str, bytes]) -> None:
        files["request.json"] = files["request.json"].replace(b"case-1", b"case-2")
        listed_anew(files)

    def forged(files: dict[str, bytes]) -> None:
        changed(files)
        files["SHA256SUMS.sig"] = forger.sign(files["SHA256SUMS"])
        files["public-key.pem"] = public_pem(forger.public_key())

    def bared(files: dict[str, bytes]) -> None:
        del files["SHA256SUMS.sig"], files["public-key.pem"]

    cases = [
        (changed, None, "is not that of its own key"),
        (changed, keys[1], "is not that of the given key"),
        (forged, keys[1], "is not that of the given key"),
        (bared, keys[1], "is not signed; ask for one that is"),
        (lambda files: files.pop("public-key.pem"), None, "its public key was taken out"),
        (lambda files: files.pop("SHA256SUMS.sig"), None, "is not that of its own key"),
    ]
    for change, key, said in cases:
        with pytest.raises(RunError) as caught:
            check_bundle(rewritten(output, change), None if key is None else str(key))
        assert said in str(caught.value)
    # Without the signer's key a forgery looks whole: this is why the key is to be given.
    assert not check_bundle(rewritten(output, forged)).key_given


@signing
def test_what_is_no_key_is_refused_before_anything_is_written(
    place: LedgerPlace, served: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"x")
        )
    )
    for key, said in (
        (locked, "is encrypted"),
        (keys[1], "is no Ed25519 private key in PEM; make one: openssl genpkey"),
        (tmp_path / "none.pem", "name a PEM file"),
    ):
        inputs = BundleInputs(output=str(tmp_path / "a.zip"), key=str(key))
        assert said in refusal(lambda inputs=inputs: export(place, 1, inputs))  # type: ignore[misc]
        assert not (tmp_path / "a.zip").exists()
    export(place, 1, BundleInputs(output=str(tmp_path / "a.zip"), key=str(keys[0])))
    message = refusal(lambda: check_bundle(str(tmp_path / "a.zip"), str(keys[0])))
    assert "is no Ed25519 public key in PEM" in message


def test_without_the_library_the_install_command_is_said(
    place: LedgerPlace, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    inputs = BundleInputs(output=str(tmp_path / "a.zip"), key="private.pem")
    assert "pip install '.[signing]' in the clone" in refusal(lambda: export(place, 1, inputs))
    assert ".[signing]" in refusal(lambda: check_bundle("a.zip", "public.pem"))
