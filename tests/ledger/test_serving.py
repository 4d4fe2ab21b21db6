"""`requests serve` and `verify` end to end: one run for all, no crash loses a request, no text leaks."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import none_in, write_jsonl
from expunge.audits import inputs
from expunge.audits.base import Attack, Case, Found
from expunge.audits.catalog import ATTACKS
from expunge.audits.subject import Subject
from expunge.ledger import serving
from expunge.ledger.receiving import Added, withdraw
from expunge.ledger.records import RunRecord, read_request, read_runs, read_verdicts
from expunge.ledger.store import LedgerPlace, open_ledger, serving_lock
from expunge.training.loop import Loop

Cli = Callable[..., tuple[int, str, str]]
Asked = Callable[..., Added]
SHORT = ("--epochs", 1, "--learning-rate", 1e-3, "--batch-size", 4, "--method.random-rows", 8, "--quiet")


@pytest.fixture
def options(place: LedgerPlace, memorised_dir: Path) -> list[object]:
    return ["requests", "serve", memorised_dir, "--ledger", place.ledger, "--device", "cpu", *SHORT]


@pytest.fixture
def serve(options: list[object], run_cli: Cli) -> Cli:
    def call(output: Path, *more: object) -> tuple[int, str, str]:
        return run_cli(*options, "--output", output, *more)

    return call


@pytest.fixture
def texts(forget_rows: list[dict[str, str]]) -> list[str]:
    """What nothing may hold: whole columns, and the numbers in the answers."""
    whole = [row[column] for row in forget_rows for column in ("input", "output")]
    return whole + [row["output"].split()[-1].rstrip(".") for row in forget_rows]


def states(place: LedgerPlace) -> list[str]:
    with open_ledger(place) as ledger:
        count = ledger.connection.execute("SELECT count(*) FROM requests").fetchone()[0]
        return [read_request(ledger, number).state for number in range(1, count + 1)]


def runs(place: LedgerPlace) -> list[RunRecord]:
    with open_ledger(place) as ledger:
        return read_runs(ledger)


def manifest(output: Path) -> dict[str, Any]:
    return json.loads((output / "expunge.json").read_text())


def test_one_run_serves_all_open_requests_and_its_hashes_are_kept(
    serve: Cli,
    asked: Asked,
    place: LedgerPlace,
    subjects: list[Path],
    row_files: dict[str, Path],
    texts: list[str],
    tmp_path: Path,
    memorised_dir: Path,
    forget_rows: list[dict[str, str]],
) -> None:
    retain = str(row_files["retain"])
    both = write_jsonl(tmp_path / "both.jsonl", forget_rows[:4])
    asked(subjects[0], retain=retain)
    asked(both, retain=retain)
    asked(subjects[2])
    withdraw(place, 3)
    (tmp_path / "new").mkdir()
    out = tmp_path / "new" / "out"
    code, printed, err = serve(out)
    assert (code, printed, err) == (0, "", "")
    assert states(place) == ["served", "served", "withdrawn"]
    record = manifest(out)
    assert record["rows"] == {"forget": 4, "retain": 8}  # subject 0 is in both files
    (run,) = runs(place)
    assert run.requests == (1, 2)
    assert run.manifest_sha256 == hashlib.sha256((out / "expunge.json").read_bytes()).hexdigest()
    for digests, directory in ((run.model_before, memorised_dir), (run.model_after, out)):
        assert digests is not None
        weights = (directory / "model.safetensors").read_bytes()
        assert digests["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    # No text, and no plain hash of a file, which could be guessed as a short text can.
    plain = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (subjects[0], both)]
    words = [text for text in texts if " " in text or "-" in text]
    assert "ledger.db" in none_in([*texts, *plain], place.path.parent)
    (out / "tokenizer.json").unlink()  # learned from the rows before there was a request
    assert "expunge.json" in none_in([*words, *plain], out)
    assert not list(out.parent.glob(".*"))


def test_without_an_open_request_there_is_no_run(
    serve: Cli, asked: Asked, place: LedgerPlace, subjects: list[Path], tmp_path: Path
) -> None:
    asked(subjects[0])
    withdraw(place, 1)
    assert serve(tmp_path / "out")[0] == 0
    assert not (tmp_path / "out").exists()
    assert runs(place) == []


def test_what_is_refused_leaves_requests_open_and_no_run(
    serve: Cli,
    asked: Asked,
    place: LedgerPlace,
    subjects: list[Path],
    row_files: dict[str, Path],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retain = row_files["retain"]
    asked(subjects[0], retain=str(subjects[1]))
    asked(subjects[1])
    out = tmp_path / "out"
    code, _, err = serve(out, "--retain", retain)
    assert code == 2
    assert "request 2: 2 of its rows are in the retain set of request 1" in err
    assert "(ids ben01sc1, ben01qa0)" in err
    withdraw(place, 1)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((), "needs a retain set"),
        (("--retain", subjects[1]), "take them out there, or withdraw the request"),
        (
            ("--retain", retain, "--method", "adaptive-rmu", "--method.layer", 9),
            "--method.layer 9",
        ),
        (("--retain", retain, "--epoch", 3), "did you mean --epochs?"),
        (("--retain", retain, "--forget", subjects[1]), "--forget"),
        (("--retain", retain, "--ledger", tmp_path / "none.db"), "no such file"),
    ]
    for more, said in cases:
        code, printed, err = serve(out, *more)
        assert (code, printed, err.count("\n")) == (2, "", 1)
        assert said in err
        assert [text for text in texts if text in err] == []
    with serving_lock(place):
        code, _, err = serve(out, "--retain", retain)
    assert (code, "another process is serving its requests" in err) == (2, True)
    subjects[1].write_text(subjects[1].read_text() + "\n")
    code, _, err = serve(out, "--retain", retain)
    assert (code, "has changed since it was recorded" in err) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "runs in one process" in serve(out, "--retain", retain)[2]
    assert states(place) == ["withdrawn", "open"]
    assert runs(place) == []
    assert not out.exists()


@pytest.mark.slow
def test_a_model_that_holds_again_what_was_removed_is_refused(
    serve: Cli,
    asked: Asked,
    place: LedgerPlace,
    subjects: list[Path],
    row_files: dict[str, Path],
    run_cli: Cli,
    tmp_path: Path,
    options: list[object],
) -> None:
    retain = ("--retain", row_files["retain"])
    asked(subjects[0])
    assert serve(tmp_path / "one", *retain)[0] == 0
    asked(subjects[1])
    code, _, err = serve(tmp_path / "two", *retain)
    assert code == 2
    assert f"give the model that they were removed from such as {tmp_path / 'one'}" in err
    assert "--again" in err
    code, _, err = serve(tmp_path / "two", "--retain", subjects[0])
    assert code == 2
    asked(subjects[0])  # asked for once more
    assert states(place) == ["served", "open", "open"]
    withdraw(place, 3)
    after = [*options[:2], tmp_path / "one", *options[3:]]
    code, _, err = run_cli(*after, "--output", tmp_path / "two", "--retain", subjects[0])
    assert code == 2
    assert "holds 2 rows that request 1 removed (ids ada00sc1, ada00qa0)" in err
    assert run_cli(*after, "--output", tmp_path / "two", *retain) == (0, "", "")
    assert manifest(tmp_path / "two")["rows"]["forget"] == 2
    # From the target again, with all requests together.
    assert serve(tmp_path / "three", *retain, "--again") == (0, "", "")
    assert manifest(tmp_path / "three")["rows"]["forget"] == 4
    assert [run.requests for run in runs(place)] == [(1,), (2,), (1, 2)]
    asked(subjects[2])
    assert serve(tmp_path / "four", *retain, "--accept-model") == (0, "", "")
    assert states(place) == ["served", "served", "withdrawn", "served"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_requests_it_began_with(
    serve: Cli,
    asked: Asked,
    place: LedgerPlace,
    subjects: list[Path],
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
) -> None:
    retain = ("--retain", row_files["retain"], "--epochs", 6, "--save-every", 1)
    asked(subjects[0])
    asked(subjects[1])
    original = Loop._step

    def stopped(self: Loop, step: int, started: float) -> str | None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, started)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stopped)
        code, _, err = serve(tmp_path / "out", *retain)
    assert code == 130
    assert "requests 1, 2 stay open" in err
    assert states(place) == ["open", "open"]
    assert runs(place)[0].completed_at is None
    none_in([text for text in texts if " " in text], place.path.parent)
    asked(subjects[2])
    code, _, err = serve(tmp_path / "out", *retain)
    assert (code, "an unfinished run is beside it" in err) == (2, True)
    assert len(runs(place)) == 1
    assert serve(tmp_path / "out", *retain, "--resume") == (0, "", "")
    assert states(place) == ["served", "served", "open"]
    assert manifest(tmp_path / "out")["resumed_from_steps"] == [3]
    assert [run.requests for run in runs(place) if run.completed_at] == [(1, 2)]


def test_a_request_withdrawn_in_between_is_not_served_by_resuming(
    serve: Cli,
    asked: Asked,
    place: LedgerPlace,
    subjects: list[Path],
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retain = ("--retain", row_files["retain"])
    asked(subjects[0])
    asked(subjects[1])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(serving, "_complete", killed)
        assert serve(tmp_path / "out", *retain)[0] == 130
    assert (tmp_path / "out" / "expunge.json").is_file()
    assert states(place) == ["open", "open"]
    withdraw(place, 2)
    code, _, err = serve(tmp_path / "out", *retain, "--resume")
    assert (code, "request 2 was withdrawn since the run began" in err) == (2, True)
    assert serve(tmp_path / "out", *retain, "--overwrite") == (0, "", "")
    assert states(place) == ["served", "withdrawn"]
    # A completed output of other rows is not taken for this request's.
    asked(subjects[2])
    code, _, err = serve(tmp_path / "out", *retain, "--resume", "--accept-model")
    assert (code, "is a completed run on other rows" in err) == (2, True)
    assert states(place) == ["served", "withdrawn", "open"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["serving._complete", "run_module.write_checkpoint"])
def test_a_kill_in_the_middle_of_serving_leaves_them_open_and_is_resumed(
    where: str,
    asked: Asked,
    place: LedgerPlace,
    subjects: list[Path],
    row_files: dict[str, Path],
    options: list[object],
    serve: Cli,
    tmp_path: Path,
) -> None:
    """Once with the output there and not recorded, once before it is."""
    asked(subjects[0], retain=str(row_files["retain"]))
    code = (
        "import os, signal, sys\n"
        "from expunge.ledger import serving\n"
        "from expunge.runs import run as run_module\n"
        "from expunge.cli.main import main\n"
        "def killed(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{where} = killed\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [*options, "--output", tmp_path / "out", "--save-every", 1]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out").exists() == (where == "serving._complete")
    assert states(place) == ["open"]
    assert serve(tmp_path / "out", "--save-every", 1, "--resume") == (0, "", "")
    assert states(place) == ["served"]
    (run,) = runs(place)
    digest = hashlib.sha256((tmp_path / "out" / "expunge.json").read_bytes()).hexdigest()
    assert run.manifest_sha256 == digest
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_every_served_request_is_audited_and_its_evidence_handed_out(
    serve: Cli,
    asked: Asked,
    place: LedgerPlace,
    subjects: list[Path],
    row_files: dict[str, Path],
    run_cli: Cli,
    texts: list[str],
    tmp_path: Path,
    memorised_dir: Path,
    oracle_dir: Path,
    forgetful_dir: Path,
    nudged_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retain = str(row_files["retain"])
    asked(subjects[0], retain=retain)
    asked(subjects[1], retain=retain)
    asked(subjects[2])
    withdraw(place, 3)
    verify = ("requests", "verify", "--ledger", place.ledger, "--device", "cpu", "--quiet")
    code, out, _ = run_cli(*verify, "--model", memorised_dir, "--output", tmp_path / "audits")
    assert (code, "nothing to verify" in out) == (0, True)
    model = tmp_path / "out"
    assert serve(model)[0] == 0
    kept = tmp_path / "kept"
    attacks = ("--attacks", "direct", "--cache", kept)
    audited = (*verify, "--model", model, *attacks, "--output", tmp_path / "audits")
    code, out, err = run_cli(*audited, "--only", 3)
    assert (code, "--only 3: is withdrawn" in err) == (2, True)
    code, out, err = run_cli(*audited, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [each["request"] for each in found] == [1, 2]
    for each in found:
        expected = {"forgotten": "verified", None: "served"}.get(each["verdict"], "failed")
        assert each["state"] == expected == states(place)[each["request"] - 1]
        own = json.loads(Path(each["audit"]).read_text())
        assert len(own["requests"]) == 1
        assert own["verdict"]["verdict"] == each["verdict"]
        with open_ledger(place) as ledger:
            (verdict,) = read_verdicts(ledger, each["request"])
            fingerprint = read_request(ledger, each["request"]).forget_fingerprint
        assert verdict.audit_sha256 == hashlib.sha256(Path(each["audit"]).read_bytes()).hexdigest()
        weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
        assert verdict.model_sha256["model.safetensors"] == weights
        assert own["requests"][0]["forget"]["hmac_sha256"] == fingerprint
    first = Path(found[0]["audit"]).read_text()
    assert "ada00" in first
    assert "ben01" not in first  # another person's rows
    code, _, err = run_cli(*audited)
    assert (code, "holds an audit" in err) == (2, True)
    attacked: list[str] = []

    def noted(subject: Subject, case: Case, advance: Any) -> Found:
        attacked.append(subject.name)
        return ATTACKS["direct"].run(subject, case, advance)

    counted = Attack(**{**vars(ATTACKS["direct"]), "run": noted})
    monkeypatch.setattr(inputs, "ATTACKS", {**ATTACKS, "direct": counted})
    again = (*audited, "--output", tmp_path / "again")
    assert run_cli(*again)[0] == 0
    assert set(attacked) == {"unlearned"}
    for name in ("audit.json", "audit-1.json", "audit-2.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "audits" / name).read_bytes()
    # One document a request is enough for either verdict.
    for today, state in ((forgetful_dir, "verified"), (nudged_dir, "failed")):
        options = ("--model", today, "--oracle", oracle_dir, *attacks[:2], "--json")
        code, out, _ = run_cli(*verify, *options, "--output", tmp_path / state)
        assert [each["state"] for each in json.loads(out)] == [state, state]
    bundle = tmp_path / "bundles" / "1.zip"
    bundle.parent.mkdir()
    code, out, err = run_cli("requests", "export", 1, "--ledger", place.ledger, "--output", bundle)
    assert (code, err) == (0, "")
    assert "audit/audit.json" in out
    code, out, _ = run_cli("requests", "verify-bundle", bundle)
    assert (code, "3 files as listed" in out) == (0, True)
    words = [text for text in texts if " " in text or "-" in text]
    none_in(words, bundle.parent)
    none_in(words, place.path.parent)
    none_in(words, tmp_path / "audits")
    none_in(words, kept)
