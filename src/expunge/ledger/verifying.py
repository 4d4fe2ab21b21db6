"""Audits every request that was served on the model as it is today, and records a verdict each.

One audit for all of them, as `expunge audit --earlier` does it; each request then has a file of its
own, which can be handed out without the ids of other people's rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.audits.auditing import audit
from expunge.audits.budgets import BudgetName
from expunge.audits.inputs import AuditInputs
from expunge.data.fingerprints import lasting
from expunge.data.formats import sha256_of
from expunge.data.rows import Reading
from expunge.disk import check_writable, made, write_whole
from expunge.errors import InputError
from expunge.ledger.material import (
    RetainSet,
    check_sides,
    forget_rows,
    given_retain_set,
)
from expunge.ledger.records import (
    Request,
    RunRecord,
    State,
    read_request,
    read_requests,
    read_runs,
    weights_of,
    write_event,
)
from expunge.ledger.store import Ledger, LedgerPlace, open_ledger
from expunge.models.asking import Asking
from expunge.models.loading import check_model
from expunge.processes import check_alone
from expunge.training.progress import Progress

AUDITED: tuple[State, ...] = ("served", "verified", "failed")
WHOLE = "audit.json"


@dataclass(frozen=True, kw_only=True)
class VerifyInputs(LedgerPlace, Asking):
    """What is audited, how, and where the audits go."""

    model: str
    """Today's model: a directory, or a hub id."""
    output: str
    """Directory for audit.json and one audit-<request>.json a request."""
    original: str | None = None
    """The model before any unlearning; null: the one that the ledger's first run began with."""
    retain: str | None = None
    """Rows that were to stay; null: the retain set of the last run, if it had one."""
    only: tuple[int, ...] = ()
    """Requests to audit; none: all that were served."""
    oracle: str | None = None
    """A model trained without these rows; without it the floor is 0."""
    nonmembers: str | None = None
    """Non-members of the forget set's kind. Membership inference needs them."""
    attacks: tuple[str, ...] = ()
    """Attacks to run, with commas or spaces between; none: all that there is material for."""
    budget: BudgetName = "quick"
    """How many rows, steps and samples: quick, standard or thorough."""
    cache: str | None = None
    """Directory that keeps what was found on target and oracle, for the next verification. It holds
    scores by row id and no text."""
    seed: int = 0
    """Seed of every draw."""


@dataclass(frozen=True)
class Verified:
    """One request's verdict as it was recorded."""

    request: int
    state: State
    verdict: str | None
    sentence: str
    audit: str


def verify(inputs: VerifyInputs, progress: Progress | None = None) -> list[Verified]:
    """Audits, writes the files and records the verdicts together; none where none was served.

    "forgotten" makes a request verified, any other verdict failed; where the audit could not tell,
    its state stays. Raises InputError before a model is loaded.
    """
    check_alone("requests verify")
    directory = Path(inputs.output)
    _check_output(directory)
    with open_ledger(inputs) as ledger:
        requests = _chosen(ledger, inputs)
        if not requests:
            return []
        original = _original(read_runs(ledger), inputs)
        retain = _retain(ledger, read_runs(ledger), inputs)
        secret = ledger.secret()
        sets = {request.id: forget_rows(ledger, request, secret) for request in requests}
    check_sides(sets, {}, [retain], secret)
    with made(directory):
        given = {"retain": retain.rows, "forget": sets[requests[0].id]}
        given |= {f"earlier {n}": sets[request.id] for n, request in enumerate(requests[1:], 1)}
        report = audit(_audit_inputs(inputs, requests, original, retain), progress, given)
    files = {}
    for request, entry in zip(requests, report["requests"], strict=True):
        files[request.id] = directory / f"audit-{request.id}.json"
        write_whole(files[request.id], json.dumps(_own(report, entry, request), indent=2) + "\n")
    with open_ledger(inputs) as ledger, ledger.change():
        return [
            _record(ledger, request, entry, report, inputs.model, files[request.id])
            for request, entry in zip(requests, report["requests"], strict=True)
        ]


def _chosen(ledger: Ledger, inputs: VerifyInputs) -> list[Request]:
    chosen = [read_request(ledger, number) for number in dict.fromkeys(inputs.only)]
    for request in chosen:
        if request.state not in AUDITED:
            raise InputError(f"--only {request.id}: is {request.state}; only served ones are audited")
    return chosen or [r for r in read_requests(ledger) if r.state in AUDITED]


def _original(runs: Sequence[RunRecord], inputs: VerifyInputs) -> str:
    """The given target, or that of the first run, which must still be the same."""
    if inputs.original is not None:
        return inputs.original
    first = next(run for run in runs if run.model_before is not None)
    mend = "give the model before any unlearning with --original"
    try:
        checked = check_model(first.model, trust_remote_code=inputs.trust_remote_code)
    except InputError as error:
        raise InputError(f"the model of run {first.id}: {error}; or {mend}") from None
    if weights_of(checked.files.sha256()) != weights_of(first.model_before or {}):
        raise InputError(f"{first.model}: is no longer the model that run {first.id} began with; {mend}")
    return first.model


def _retain(ledger: Ledger, runs: Sequence[RunRecord], inputs: VerifyInputs) -> RetainSet:
    """The given retain set, or that of the last run, which must still be the same."""
    secret = ledger.secret()
    if inputs.retain is not None:
        return given_retain_set(inputs, inputs.retain, secret)
    last = [run for run in runs if run.completed_at is not None][-1]
    if len(last.retain) != 1:
        raise InputError(
            f"--retain: run {last.id} had {len(last.retain)} retain sets, and an audit asks rows of"
            " one; give it"
        )
    recorded = last.retain[0]
    found = given_retain_set(Reading.recorded(recorded), recorded["source"], secret, again=True)
    if found.fingerprint != recorded["fingerprint"]:
        raise InputError(
            f"{found.source}: has changed since run {last.id}; give the rows that are to stay with"
            " --retain"
        )
    return found


def _audit_inputs(
    inputs: VerifyInputs, requests: Sequence[Request], original: str, retain: RetainSet
) -> AuditInputs:
    return inputs.into(
        AuditInputs,
        original=original,
        forget=requests[0].forget,
        retain=retain.source,
        earlier=tuple(request.forget for request in requests[1:]),
        output=str(Path(inputs.output) / WHOLE),
    )


def _own(report: Mapping[str, Any], entry: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """audit.json of one request alone.

    The hash of its file is that which the ledger has.
    """
    forget = {**entry["forget"], "hmac_sha256": request.forget_fingerprint}
    rows = {**report["rows"], "forget": {k: forget[k] for k in ("source", "hmac_sha256", "rows")}}
    return {
        **report,
        "verdict": entry["verdict"],
        "rows": rows,
        "requests": [{**entry, "forget": forget}],
    }


def _record(
    ledger: Ledger,
    request: Request,
    entry: Mapping[str, Any],
    report: Mapping[str, Any],
    model: str,
    path: Path,
) -> Verified:
    verdict, sentence = entry["verdict"]["verdict"], entry["verdict"]["sentence"]
    models = report["models"]
    number = ledger.insert(
        "verdicts",
        request=request.id,
        verdict=verdict,
        sentence=sentence,
        model=lasting(model),
        model_sha256=json.dumps(models["unlearned"]["sha256"]),
        original_sha256=json.dumps(models["target"]["sha256"]),
        audit=str(path.absolute()),
        audit_sha256=sha256_of(path),
    )
    # It may have been withdrawn or reopened while the audit went on.
    state = read_request(ledger, request.id).state
    if verdict is not None and state in AUDITED:
        state = "verified" if verdict == "forgotten" else "failed"
    write_event(ledger, request.id, "audited", state, verdict=number, note=verdict or "none")
    return Verified(request.id, state, verdict, sentence, str(path))


def _check_output(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output {directory}: is a file; name a directory")
    if not directory.absolute().parent.is_dir():
        raise InputError(f"--output {directory}: its parent does not exist; make it first")
    check_writable(directory, inside=True)
    if (directory / WHOLE).exists():
        raise InputError(
            f"--output {directory}: holds an audit, which earlier verdicts may rest on; name another"
        )
