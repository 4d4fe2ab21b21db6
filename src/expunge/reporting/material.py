"""What a report is made of: the files of a run, read and checked, before a word is written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from expunge.audits.inputs import FORMAT as AUDIT_FORMAT
from expunge.data.fingerprints import PLACE, data_fingerprint, named, same_data
from expunge.data.formats import sha256_of
from expunge.data.rows import Reading, RowSet
from expunge.errors import InputError
from expunge.evaluation.score_files import SCORES, check_one_form, read_scores
from expunge.evaluation.scorecard import Scorecard
from expunge.models.files import MANIFEST, read_json
from expunge.runs.manifest import finite
from expunge.runs.run import DIRECTIONS, METRICS

AUDIT = "audit.json"
"""Its name in a run directory."""
BEFORE, ORACLE = "before.json", "oracle.json"
"""Scores of the target and of an oracle, in a run directory."""
_BACK = "put back what the run wrote"
_MANIFEST_KEYS: Mapping[type, tuple[str, ...]] = {
    dict: (
        "settings", "settings.inputs", "settings.method", "settings.training", "rows",
        "data_hmac_sha256", "environment", "method_notes", "selection", "seconds",
        "peak_memory_bytes", "model_sha256", "output_sha256",
    ),
    str: (
        "expunge", "settings.inputs.model", "settings.inputs.forget", "settings.method.name",
        "data_hmac_sha256.forget", "selection.why", "selection.stopped",
    ),
    int: ("rows.forget", "steps", "selection.chosen_step"),
    list: ("selection.candidates", "warnings", "changed_tensors"),
}  # fmt: skip
"""Entries that a report needs, the outer ones first."""


@dataclass(frozen=True)
class ReportInputs:
    """Which run is reported, from which files, and where the report goes."""

    run: str
    """The run directory: what expunge run wrote."""
    scores: tuple[str, ...] = ()
    """Scores before and after; one alone is that after. None: RUN/before.json and RUN/scores.json, if
    they exist."""
    oracle_scores: str | None = None
    """Scores of a model trained without the forget set; null: RUN/oracle.json, if it exists."""
    audit: str | None = None
    """The audit; null: RUN/audit.json, if it exists."""
    forget: str | None = None
    """The run's forget set, for the number of its documents and to reveal its text."""
    retain: str | None = None
    """The run's retain set, for the same."""
    subject: str | None = None
    """Your reference for whoever asked: a case number rather than a name."""
    requested: str | None = None
    """Date of the erasure request, as YYYY-MM-DD."""
    output: str | None = None
    """Directory for report.html and report.json; null: RUN."""
    card: bool = True
    """Write a section on the run into the README.md of RUN."""
    reveal: bool = False
    """Add the text of the rows to the report; keep it then as carefully as the rows."""

    def __post_init__(self) -> None:
        if len(self.scores) > 2:
            raise InputError("--scores: takes two files, BEFORE AFTER; others go to expunge compare")
        if self.reveal and self.forget is None:
            raise InputError("--reveal: shows the text of the rows; give --forget FILE")
        if self.subject is not None and not self.subject.strip():
            raise InputError("--subject: is empty; give a reference or leave it out")
        if self.requested is not None:
            try:
                # It reads other forms too, which the page would show as they are.
                if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", self.requested):
                    raise ValueError
                asked = date.fromisoformat(self.requested)
            except ValueError:
                raise InputError(
                    f"--requested {self.requested}: is not a date; write it as YYYY-MM-DD"
                ) from None
            if asked > datetime.now(UTC).date() + timedelta(days=1):  # today, wherever that is
                raise InputError(
                    f"--requested {self.requested}: is in the future; give the day it was made"
                )


@dataclass(frozen=True)
class Card:
    """One model's scorecard, and where it was read."""

    role: str
    """target, unlearned or oracle."""
    source: str
    model: str
    """The model that was measured, as its file says."""
    card: Scorecard
    is_checked: bool
    """Whether its file holds hashes of the weights, and they are those of the run's model or target."""


@dataclass(frozen=True, repr=False)
class Material:
    """Everything that was read. Only `rows` and the audit's `texts` hold text."""

    inputs: ReportInputs
    directory: Path
    manifest: Mapping[str, Any]
    finished: str
    """When the run was finished: UTC, ISO 8601."""
    finished_from: str
    metrics: Sequence[Mapping[str, Any]] | None
    """None where the run directory holds no metrics.jsonl."""
    cards: Sequence[Card]
    audit: Mapping[str, Any] | None
    audit_source: str | None
    rows: Mapping[str, RowSet]
    """Forget and retain set, where given."""
    changed_files: Sequence[str]
    """Files that are not as the manifest recorded them."""
    missing_files: Sequence[str]

    def card(self, role: str) -> Scorecard | None:
        """The scorecard of the target, the unlearned model or the oracle."""
        return next((each.card for each in self.cards if each.role == role), None)


def gather(inputs: ReportInputs) -> Material:
    """Reads and checks everything. Raises InputError that names the file and what is wrong in it."""
    directory = Path(inputs.run)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run directory; name what expunge run wrote")
    output = directory if inputs.output is None else Path(inputs.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; name a directory")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: its parent does not exist; make it first")
    manifest = read_manifest(directory / MANIFEST)
    changed, missing = _compared(directory, manifest["output_sha256"])
    audit_path = _audit_path(inputs.audit, directory)
    finished, finished_from = _finished(manifest, directory / MANIFEST)
    return Material(
        inputs=inputs,
        directory=directory,
        manifest=manifest,
        finished=finished,
        finished_from=finished_from,
        metrics=_metrics(directory / METRICS),
        cards=_cards(inputs, directory, manifest),
        audit=None if audit_path is None else _audit(audit_path, manifest),
        audit_source=None if audit_path is None else named(str(audit_path)),
        rows=_rows(inputs, manifest),
        changed_files=changed,
        missing_files=missing,
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, whose NaN is no measurement."""
    return dict(finite(read_json(path)))


def read_manifest(path: Path) -> dict[str, Any]:
    """The record of a complete run. Raises InputError that names the entry which is not as it should."""
    if not path.is_file():
        raise InputError(
            f"{path.parent}: holds no {MANIFEST}, so it is no finished run; finish it with expunge run"
            " --resume, or name another directory"
        )
    manifest = _read(path)
    if manifest.get("status") != "complete":
        raise InputError(f"{path}: the run is not complete; finish it with expunge run --resume")
    if isinstance(rows := manifest.get("rows"), dict) and "forget" not in rows:
        raise InputError(
            f"{path}: records an oracle, which had no rows to forget; name the directory of an"
            " unlearned model"
        )
    for kind, keys in _MANIFEST_KEYS.items():
        for key in keys:
            value: Any = manifest
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{path}: {key} is not there or not as expunge run writes it; {_BACK}")
    for key, number in (("seconds", int | float), ("peak_memory_bytes", int)):
        for name, value in manifest[key].items():
            if not isinstance(value, number) or isinstance(value, bool):
                raise InputError(f"{path}: {key}.{name} is no number; {_BACK}")
    return manifest


def _finished(manifest: Mapping[str, Any], path: Path) -> tuple[str, str]:
    if isinstance(manifest.get("finished"), str):
        return manifest["finished"], MANIFEST
    changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return changed.isoformat(timespec="seconds"), f"the time stamp of the file {MANIFEST}"


def _compared(directory: Path, recorded: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Files that have changed since the run, and files that are gone."""
    missing = [name for name in recorded if not (directory / name).is_file()]
    changed = [
        name
        for name, digest in recorded.items()
        if name not in missing and sha256_of(directory / name) != digest
    ]
    return changed, missing


def _metrics(path: Path) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entries.append(json.loads(line))
            if type(entries[-1]["step"]) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(
                f"{path} line {number}: is not a line that expunge run writes; {_BACK}"
            ) from None
    return entries


def _cards(inputs: ReportInputs, directory: Path, manifest: Mapping[str, Any]) -> list[Card]:
    after = inputs.scores[-1:] or [str(directory / SCORES)]
    before = inputs.scores[:-1] or [str(directory / BEFORE)]
    oracle = [inputs.oracle_scores or str(directory / ORACLE)]
    given = {*inputs.scores, inputs.oracle_scores}
    paths = [
        (role, Path(path))
        for role, (path,) in (("target", before), ("unlearned", after), ("oracle", oracle))
        if path in given or Path(path).is_file()
    ]
    cards: list[Card] = []
    recorded = _recorded(manifest)
    for role, path in paths:
        file = path / SCORES if path.is_dir() else path
        card = read_scores(str(file))
        values = _read(file)
        model = values.get("model")
        measured = named(model) if isinstance(model, str) else ""
        option = "--oracle-scores" if role == "oracle" else "--scores"
        is_checked = _check_weights(values, role, recorded, f"{option} {file}")
        cards.append(Card(role, named(str(file)), measured, card, is_checked))
    check_one_form({each.role: each.card for each in cards})
    return cards


def _recorded(manifest: Mapping[str, Any]) -> dict[str, tuple[set[str], str]]:
    """By role the hashes of the weights that the run wrote and began with, and what that model is."""
    return {
        "unlearned": (_weights(manifest["output_sha256"]), "this run's model"),
        "target": (_weights(manifest["model_sha256"]), "this run's target"),
    }


def _check_weights(
    values: Mapping[str, Any],
    role: str,
    recorded: Mapping[str, tuple[set[str], str]],
    given: str,
) -> bool:
    """Whether scores are of the weights that the run wrote, or began with.

    False where nothing says so. Raises InputError where they are of others.
    """
    measured = values.get("model_sha256")
    if not isinstance(measured, dict) or not measured:
        return False
    found = set(measured.values())
    expected, meant = recorded.get(role, (None, ""))
    for weights, other in recorded.values():
        if found == weights != expected:
            raise InputError(
                f"{given}: was measured on {other}; give --scores BEFORE AFTER in this order"
            )
    if expected is not None and found != expected:
        raise InputError(
            f"{given}: was measured on other weights than {meant}; measure that one with expunge"
            " evaluate"
        )
    return expected is not None


def _audit_path(given: str | None, directory: Path) -> Path | None:
    path = directory / AUDIT if given is None else Path(given)
    if given is not None and path.is_dir():
        path /= AUDIT
    if path.is_file():
        return path
    if given is None:
        return None
    raise InputError(f"--audit {path}: no such file; name one that is there")


def _audit(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    audit = _read(path)
    if audit.get("format") != AUDIT_FORMAT:
        raise InputError(f"{path}: is not an {AUDIT_FORMAT}; make it with expunge audit")
    for name, (expected, meant) in _recorded(manifest).items():
        try:
            audited = _weights(audit["models"][name]["sha256"])
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: names no {name} model; make it anew") from None
        if audited != expected:
            raise InputError(
                f"{path}: its {name} model has other weights than {meant}; audit this run:"
                " expunge audit RUN --original TARGET"
            )
    return audit


def _weights(digests: Mapping[str, str]) -> set[str]:
    return {digest for name, digest in digests.items() if name.endswith(".safetensors")} - {
        digests.get(DIRECTIONS)
    }


def _rows(inputs: ReportInputs, manifest: Mapping[str, Any]) -> dict[str, RowSet]:
    """Given row files, which must be those of the run."""
    found = {}
    reading = Reading.recorded(manifest["settings"]["inputs"])
    for role in ("forget", "retain"):
        source = getattr(inputs, role)
        if source is None:
            continue
        rows = reading.read(source, role, again=True)
        recorded = manifest["data_hmac_sha256"].get(role)
        if recorded is None:
            raise InputError(f"--{role} {source}: the run had no {role} set; leave the option out")
        same = same_data(data_fingerprint(rows), recorded)
        if same is None:
            raise InputError(
                f"--{role} {source}: the run's hashes are keyed with another secret; name its file with"
                f" {PLACE}, or leave the option out"
            )
        if not same:
            raise InputError(
                f"--{role} {source}: is not the {role} set of this run (its hash differs from the one"
                f" in {MANIFEST}); give the same file"
            )
        found[role] = rows
    return found


def plain(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A whole number of JSON may be beyond every float.
    return float(value) if abs(value) <= sys.float_info.max else None
