"""The evidence of one request: a zip of its record and of what shows that it was served.

    request.json          the record: rows by id and keyed hash, runs, verdicts, history
    run/expunge.json      the manifest of the last run that served it
    run/scores.json, run/report.html, run/report.json     where the run's directory has them, a report
                          only where its audit is of this request alone
    audit/audit.json      the last audit of this request
    SHA256SUMS            the SHA-256 of each file above; `sha256sum --check` reads it
    SHA256SUMS.sig, public-key.pem     the Ed25519 signature of SHA256SUMS, where a key is given

The same content gives the same bytes: order, times and modes in the zip are fixed, nothing is
compressed (each zlib compresses in its own way), and Ed25519 draws nothing at random.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import expunge
from expunge.data.fingerprints import handed_out
from expunge.data.rows import Row, listed
from expunge.disk import check_writable, write_whole
from expunge.errors import ExpungeError, InputError, RunError
from expunge.ledger.material import forget_rows
from expunge.ledger.records import (
    Request,
    RunRecord,
    VerdictRecord,
    read_events,
    read_request,
    read_rows_of,
    read_runs,
    read_verdicts,
)
from expunge.ledger.signing import (
    check_installed,
    is_signed_by,
    key_name,
    public_key_file,
    public_pem,
    read_private_key,
    read_public_key,
)
from expunge.ledger.store import LedgerPlace, open_ledger

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT = "expunge-evidence/1"
RECORD, MANIFEST, AUDIT = "request.json", "run/expunge.json", "audit/audit.json"
SUMS, SIGNATURE, PUBLIC_KEY = "SHA256SUMS", "SHA256SUMS.sig", "public-key.pem"
_BESIDE = ("scores.json", "report.html", "report.json")
_REPORT = ("run/report.html", "run/report.json")
_EARLIEST = (1980, 1, 1, 0, 0, 0)
_LARGEST, _MOST = 2**28, 64
"""Bytes and number of the files that `check_bundle` reads: evidence is small, a zip bomb is not."""
_NORMAL: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
SHORTEST = 12
"""Characters from which a text is searched for: a shorter one, such as a town, stands anywhere."""


@dataclass(frozen=True, kw_only=True)
class BundleInputs:
    """What is written."""

    output: str
    """The zip file to write."""
    key: str | None = None
    """Ed25519 private key (PEM, unencrypted) to sign with."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True)
class Bundle:
    """A bundle as it was written."""

    files: Sequence[str]
    sha256: str
    signed_by: str | None
    """Name of the key, or None."""
    warnings: Sequence[str]


@dataclass(frozen=True)
class Checked:
    """A bundle that was found whole."""

    request: int
    state: str
    files: Sequence[str]
    signed_by: str | None
    """Name of the key, or None where it is not signed."""
    key_given: bool
    """Whether the key was the user's; else it came with the bundle and shows no identity."""


def export(place: LedgerPlace, number: int, inputs: BundleInputs) -> Bundle:
    """Writes the evidence of a request.

    Raises InputError where a file is gone or no longer what was recorded, and where one holds the
    request's text, with nothing written.
    """
    output = Path(inputs.output)
    _check_output(output, overwrite=inputs.overwrite)
    key = None if inputs.key is None else read_private_key(inputs.key)
    with open_ledger(place) as ledger, ledger.reading():
        request = read_request(ledger, number)
        runs = [run for run in read_runs(ledger) if number in run.requests and run.completed_at]
        verdicts = read_verdicts(ledger, number)
        record = {
            "format": FORMAT,
            "expunge": expunge.__version__,
            # Neither the day of the export nor what depends on it: the same content, the same bytes.
            "request": {k: v for k, v in request.to_json(request.received).items() if k != "overdue"},
            "rows": [
                {"id": row_id, "hmac_sha256": fingerprint}
                for row_id, fingerprint in read_rows_of(ledger, number)
            ],
            "runs": [asdict(run) for run in runs],
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "events": [asdict(event) for event in read_events(ledger, number)],
        }
        warnings = []
        secret = ledger.secret()
        try:
            rows = forget_rows(ledger, request, secret)
        except InputError:
            rows = None
            warnings.append(
                "the request's rows are not where they were, so the files were not searched for"
                " their text"
            )
    files = {RECORD: _json_bytes(handed_out(record))}
    if runs:
        of_run = _run_files(request, runs[-1])
        if any(name in of_run for name in _REPORT) and not _only_of(request, runs[-1], of_run):
            warnings.append(
                "the run's report is left out: it is not of this request alone; make it with"
                " expunge report RUN --audit and this request's own audit"
            )
            of_run = {name: content for name, content in of_run.items() if name not in _REPORT}
        files |= of_run
    if verdicts:
        files[AUDIT] = _audit_file(request, verdicts[-1], place)
    for name, content in files.items():
        held = [] if rows is None else rows_in(content, rows)
        if held:
            raise InputError(
                f"request {number}: {name} holds the text of {len(held)} of its rows (ids"
                f" {listed(held)}); have expunge report or expunge audit make it again, without --reveal"
            )
    sealed = _sealed(files, key)
    try:
        write_whole(output, sealed)
    except OSError as error:
        raise RunError(f"--output {output}: {error.strerror}; nothing was written") from None
    return Bundle(
        tuple(files),
        hashlib.sha256(sealed).hexdigest(),
        None if key is None else key_name(key.public_key()),
        tuple(warnings),
    )


def check_bundle(bundle: str, public_key: str | None = None) -> Checked:
    """Checks a bundle's files, signature and record against each other.

    Raises InputError for what is no bundle, RunError for one that is not what was signed.
    """
    key = None if public_key is None else public_key_file(public_key)
    files = _read_bundle(bundle)
    _check_sums(bundle, files)
    signed_by = None
    if SIGNATURE in files or PUBLIC_KEY in files:
        check_installed(bundle)
        used = key
        if used is None:
            if PUBLIC_KEY not in files:
                raise RunError(f"{bundle}: is signed but its public key was taken out")
            used = read_public_key(f"{bundle} {PUBLIC_KEY}", files[PUBLIC_KEY])
        if not is_signed_by(used, files.get(SIGNATURE, b""), files[SUMS]):
            whose = "the given key" if key is not None else "its own key"
            raise RunError(f"{bundle}: the signature of {SUMS} is not that of {whose}")
        signed_by = key_name(used)
    elif key is not None:
        raise RunError(f"{bundle}: is not signed; ask for one that is, or leave out --public-key")
    record = _check_record(bundle, files)
    names = tuple(name for name in files if name not in (SUMS, SIGNATURE, PUBLIC_KEY))
    request = record["request"]
    return Checked(request["id"], request["state"], names, signed_by, key is not None)


def rows_in(content: bytes, rows: Iterable[Row]) -> list[str]:
    """Ids of the rows whose input or output is in the file: as it is, in JSON, or in HTML.

    A model may have written it in another Unicode form than the row has.
    """
    found = []
    for row in rows:
        texts = [text.strip() for text in (row.input, row.output)]
        long = [text for text in texts if len(text) >= SHORTEST]
        long += [unicodedata.normalize(form, text) for text in long for form in _NORMAL]
        forms = {form for text in long for form in _forms(text)}
        if any(form in content for form in forms):
            found.append(row.id)
    return found


def _forms(text: str) -> set[bytes]:
    escaped = html.escape(text)
    # Jinja writes quotes as numbers, the standard library one of them in hexadecimal.
    numbered = escaped.replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    written = {text, escaped, numbered, html.escape(text, quote=False)}
    written |= {json.dumps(text, ensure_ascii=plain)[1:-1] for plain in (True, False)}
    return {form.encode() for form in written}


def _run_files(request: Request, run: RunRecord) -> dict[str, bytes]:
    directory = Path(run.output)
    try:
        manifest = (directory / "expunge.json").read_bytes()
    except OSError as error:
        raise InputError(
            f"request {request.id}: the manifest of run {run.id}, {directory / 'expunge.json'}:"
            f" {error.strerror}; put the run's directory back"
        ) from None
    if hashlib.sha256(manifest).hexdigest() != run.manifest_sha256:
        raise InputError(
            f"request {request.id}: {directory / 'expunge.json'} is not the one that run {run.id}"
            " wrote; put the run's directory back"
        )
    found = {MANIFEST: manifest}
    for name in _BESIDE:
        if (directory / name).is_file():
            found[f"run/{name}"] = (directory / name).read_bytes()
    return found


def _only_of(request: Request, run: RunRecord, files: Mapping[str, bytes]) -> bool:
    """Whether the run's report names rows of this request alone: an audit lists facts by id."""
    try:
        audit = json.loads(files["run/report.json"])["audit"]
        if audit is None:
            return True
        (audited,) = audit["requests"]
        of_request = audited["hmac_sha256"] == request.forget_fingerprint
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False  # the page alone does not say
    return of_request or list(run.requests) == [request.id]


def _audit_file(request: Request, verdict: VerdictRecord, place: LedgerPlace) -> bytes:
    again = f"put it back or audit again with expunge requests verify --ledger {place.path}"
    try:
        content = Path(verdict.audit).read_bytes()
    except OSError as error:
        raise InputError(
            f"request {request.id}: its audit {verdict.audit}: {error.strerror}; {again}"
        ) from None
    if hashlib.sha256(content).hexdigest() != verdict.audit_sha256:
        raise InputError(f"request {request.id}: {verdict.audit} is not what the audit wrote; {again}")
    return content


def _sealed(files: Mapping[str, bytes], key: Ed25519PrivateKey | None) -> bytes:
    """The zip's bytes."""
    sums = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())
    ).encode()
    members = {**files, SUMS: sums}
    if key is not None:
        members[SIGNATURE] = key.sign(sums)
        members[PUBLIC_KEY] = public_pem(key.public_key())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(members.items()):
            member = zipfile.ZipInfo(name, _EARLIEST)
            member.create_system = 3  # Unix, on every system
            member.external_attr = 0o644 << 16
            archive.writestr(member, content)
    return buffer.getvalue()


def _read_bundle(bundle: str) -> dict[str, bytes]:
    """Every file of the zip. Nothing is unpacked to the disk."""
    try:
        with zipfile.ZipFile(bundle) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if SUMS not in names or RECORD not in names:
                raise InputError(
                    f"{bundle}: holds no {SUMS} and {RECORD}; give what expunge requests export wrote"
                )
            if len(set(names)) < len(names):
                raise RunError(f"{bundle}: holds two files of one name")
            if len(members) > _MOST or sum(member.file_size for member in members) > _LARGEST:
                raise RunError(f"{bundle}: holds more than any evidence; it was not unpacked")
            return {member.filename: archive.read(member) for member in members}
    except ExpungeError:
        raise
    except OSError as error:
        raise InputError(f"{bundle}: {error.strerror or error}; name a bundle") from None
    except Exception:  # each way of packing has errors of its own for what it cannot unpack
        raise InputError(f"{bundle}: is no zip file, or a damaged one; fetch it again") from None


def _check_sums(bundle: str, files: Mapping[str, bytes]) -> None:
    lines = [
        re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        for line in files[SUMS].decode(errors="replace").splitlines()
    ]
    sums = {match[2]: match[1] for match in lines if match is not None}
    if None in lines or len(sums) < len(lines):
        raise RunError(f"{bundle}: {SUMS} is not a list of SHA-256 and names")
    there = set(files) - {SUMS, SIGNATURE, PUBLIC_KEY}
    for name in sorted(there | set(sums)):
        if name not in there:
            raise RunError(f"{bundle}: {name!r} is listed and missing")
        if name not in sums:
            raise RunError(f"{bundle}: {name!r} is in no list; it was added later")
        if hashlib.sha256(files[name]).hexdigest() != sums[name]:
            raise RunError(f"{bundle}: {name!r} was changed; its SHA-256 is not the listed one")


def _check_record(bundle: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Whether record, manifest and audit speak of the same run and verdict."""
    try:
        record = json.loads(files[RECORD])
        if record["format"] != FORMAT:
            raise InputError(
                f"{bundle}: is of the format {record['format']!r}, this expunge knows {FORMAT!r};"
                " update expunge"
            )
        manifest = record["runs"][-1]["manifest_sha256"] if record["runs"] else None
        audit = record["verdicts"][-1]["audit_sha256"] if record["verdicts"] else None
        number, state = record["request"]["id"], record["request"]["state"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise RunError(f"{bundle}: {RECORD} is not a request's record") from None
    if type(number) is not int or not isinstance(state, str):
        raise RunError(f"{bundle}: {RECORD} is not a request's record")
    for name, recorded in ((MANIFEST, manifest), (AUDIT, audit)):
        found = hashlib.sha256(files[name]).hexdigest() if name in files else None
        if found != recorded:
            raise RunError(f"{bundle}: {name} is not the one that {RECORD} speaks of")
    return record


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.is_dir():
        raise InputError(f"--output {output}: is a directory; name a file")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: its directory does not exist; make it first")
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: exists; choose another file or give --overwrite")
    check_writable(output)
    if output.exists() and not _is_bundle(output):
        raise InputError(
            f"--output {output}: --overwrite replaces evidence only, which this is not; choose"
            " another file"
        )


def _is_bundle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return {SUMS, RECORD} <= set(archive.namelist())
    except Exception:  # what it cannot read is none
        return False


def _json_bytes(values: Any) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
