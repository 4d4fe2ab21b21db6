"""One run for all open requests, recorded so that a crash at any moment loses nothing.

The run is recorded before it starts, with the requests that it is for. They are marked served in one
transaction, once its output is there as a whole. In between they are open, and the same call with
`resume` goes on with the same requests, whatever came in since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from expunge.data.fingerprints import data_fingerprint, lasting
from expunge.data.formats import sha256_of
from expunge.data.rows import RowSet, listed
from expunge.errors import InputError, Interrupted
from expunge.ledger.dates import now
from expunge.ledger.material import (
    RetainSet,
    check_sides,
    forget_rows,
    given_retain_set,
    join,
    retain_sets,
)
from expunge.ledger.records import (
    Request,
    RunRecord,
    State,
    carried,
    read_request,
    read_requests,
    read_rows_of,
    read_runs,
    weights_of,
    write_event,
)
from expunge.ledger.store import Ledger, LedgerPlace, open_ledger, serving_lock
from expunge.methods.base import Method
from expunge.models.files import MANIFEST
from expunge.models.loading import check_model
from expunge.processes import check_alone
from expunge.runs.run import RunInputs, run
from expunge.training.options import TrainingOptions
from expunge.training.progress import Progress, Silent

_ERASED: tuple[State, ...] = ("served", "verified", "failed")


@dataclass(frozen=True)
class ServeInputs(RunInputs):
    """Those of a run, whose rows are the requests', and the ledger."""

    forget: Annotated[str, tyro.conf.Suppress] = ""
    output: str = ""
    """The run directory to write: a model directory with the record of the run."""
    ledger: str = ""
    """The ledger whose open requests are served."""
    again: bool = False
    """Serve requests again that were served before, for a run from a model that still holds them."""
    accept_model: bool = False
    """Take a model, though the ledger does not know whether it lost what was removed before."""
    secret: str | None = None
    """File with the ledger's secret; null: FILE.secret beside the ledger."""
    by: str | None = None
    """Who writes; null: this user at this machine."""

    def __post_init__(self) -> None:
        for option in ("ledger", "output"):
            if not getattr(self, option):
                raise InputError(f"--{option}: is missing; see expunge requests serve --help")
        if self.forget:
            raise InputError("--forget: the rows are those of the ledger's requests; leave it out")


@dataclass(frozen=True)
class Served:
    """What a call of `serve` came to."""

    run: int
    requests: tuple[int, ...]
    manifest: Mapping[str, Any]
    twice: int
    """Rows that several requests have in common; each was removed once."""


@dataclass(frozen=True)
class _Plan:
    """The requests of a run, with their rows."""

    run: int
    requests: tuple[int, ...]
    sets: Mapping[str, RowSet]
    retain: Sequence[RetainSet]
    twice: int
    is_new: bool


def serve(
    inputs: ServeInputs,
    method: Method,
    options: TrainingOptions,
    progress: Progress | None = None,
    preset: str | None = None,
) -> Served | None:
    """Serves every open request with one run; None where none is open.

    Raises InputError before a model is loaded, with no run recorded; what `run` raises otherwise.
    """
    progress = progress or Silent()
    check_alone("requests serve")
    place = LedgerPlace(inputs.ledger, inputs.secret, inputs.by)
    with open_ledger(place):
        pass  # a wrong name is said before a lock is made beside it
    with serving_lock(place):
        with open_ledger(place) as ledger:
            plan = _planned(ledger, inputs, progress)
        if plan is None:
            return None
        try:
            manifest = run(_run_inputs(inputs, plan), method, options, progress, preset, given=plan.sets)
            _check_is_ours(manifest, plan, inputs.output)
        except InputError:
            if plan.is_new:
                with open_ledger(place) as ledger:
                    _forget_run(ledger, plan.run)
            raise
        except Interrupted as stopped:
            raise Interrupted(
                f"{stopped}; requests {_numbers(plan.requests)} stay open", stopped.exit_code
            ) from None
        with open_ledger(place) as ledger:
            _complete(ledger, plan, manifest, Path(inputs.output))
    return Served(plan.run, plan.requests, manifest, plan.twice)


def _planned(ledger: Ledger, inputs: ServeInputs, progress: Progress) -> _Plan | None:
    """Reads and checks all rows and records the run, or finds the one to go on with."""
    secret = ledger.secret()
    with ledger.reading():
        runs, known = read_runs(ledger), read_requests(ledger)
        unfinished = _unfinished(runs, inputs) if inputs.resume else None
        if unfinished is not None:
            requests = [read_request(ledger, number) for number in unfinished.requests]
            _check_still_wanted(requests, inputs)
        else:
            states: tuple[State, ...] = ("open", *(_ERASED if inputs.again else ()))
            requests = [request for request in known if request.state in states]
        if not requests:
            return None
        chosen = {request.id for request in requests}
        gone = {
            request.id: {fingerprint for _, fingerprint in read_rows_of(ledger, request.id)}
            for request in known
            if request.state in _ERASED and request.id not in chosen
        }
        _check_lineage(inputs, sorted(gone), runs)
        by_request = {request.id: forget_rows(ledger, request, secret) for request in requests}
        given = None
        if inputs.retain is not None:
            given = given_retain_set(inputs, inputs.retain, secret)
        retain = retain_sets(ledger, requests, given, secret)
    check_sides(by_request, gone, retain, secret)
    later = [r.id for r in known if r.state == "open" and r.id not in chosen]
    if later:
        progress.message(
            f"the requests {_numbers(later)} came after this run began; serve them with the next"
        )
    label = f"{ledger.place.path.name}: request{'s' * (len(chosen) > 1)} {_numbers(sorted(chosen))}"
    forget, twice = join({str(n): rows for n, rows in by_request.items()}, secret, label)
    sets = {"forget": forget}
    if retain:
        named = {("retain" if i == 0 else f"retain {i}"): r.rows for i, r in enumerate(retain)}
        sets["retain"], _ = join(named, secret, f"{ledger.place.path.name}: retain sets")
    if inputs.nonmembers is not None:
        sets["nonmembers"] = inputs.read(inputs.nonmembers, "nonmembers")
    numbers = tuple(sorted(chosen))
    if unfinished is not None:
        return _Plan(unfinished.id, numbers, sets, retain, twice, is_new=False)
    return _Plan(_begin(ledger, numbers, retain, inputs), numbers, sets, retain, twice, is_new=True)


def _unfinished(runs: Sequence[RunRecord], inputs: ServeInputs) -> RunRecord | None:
    """The last run with this output, where it was not completed."""
    output = str(Path(inputs.output).absolute())
    of_output = [each for each in runs if each.output == output]
    if not of_output or of_output[-1].completed_at is not None:
        return None
    return of_output[-1]


def _check_still_wanted(requests: Sequence[Request], inputs: ServeInputs) -> None:
    withdrawn = [request.id for request in requests if request.state == "withdrawn"]
    if withdrawn:
        raise InputError(
            f"--resume: request {withdrawn[0]} was withdrawn since the run began; begin anew without"
            f" it: --overwrite and no --resume (--output {inputs.output})"
        )


def _check_lineage(inputs: ServeInputs, erased: Sequence[int], runs: Sequence[RunRecord]) -> None:
    """Raises InputError where the model may hold again what earlier requests removed."""
    if not erased or inputs.accept_model:
        return
    checked = check_model(inputs.model, trust_remote_code=inputs.trust_remote_code)
    there = carried(weights_of(checked.files.sha256()), runs)
    missing = [number for number in erased if number not in there]
    if missing:
        outputs = [r.output for r in runs if r.completed_at and set(missing) <= set(r.requests)]
        last = f" such as {outputs[-1]}" if outputs else ""
        raise InputError(
            f"--model {inputs.model}: no run removed the served requests"
            f" {_numbers(missing)} from it; give the model that they were removed from{last}, serve"
            " them --again, or --accept-model"
        )


def _run_inputs(inputs: ServeInputs, plan: _Plan) -> RunInputs:
    sources = {name: plan.sets[name].source for name in ("forget", "retain") if name in plan.sets}
    return inputs.into(RunInputs, **{"retain": None, **sources})


def _check_is_ours(manifest: Mapping[str, Any], plan: _Plan, output: str) -> None:
    """A completed output is taken as it is by --resume: it must be of these rows."""
    found = {name: data_fingerprint(rows) for name, rows in plan.sets.items()}
    if manifest["data_hmac_sha256"] != found:
        raise InputError(
            f"--output {output}: is a completed run on other rows; choose another output, or"
            " --overwrite it without --resume"
        )


def _begin(
    ledger: Ledger, numbers: Sequence[int], retain: Sequence[RetainSet], inputs: ServeInputs
) -> int:
    with ledger.change() as connection:
        found = ledger.insert(
            "runs",
            output=str(Path(inputs.output).absolute()),
            model=lasting(inputs.model),
            retain=json.dumps([each.to_json() for each in retain]),
        )
        connection.executemany(
            "INSERT INTO run_requests VALUES (?, ?)", [(found, number) for number in numbers]
        )
        return found


def _forget_run(ledger: Ledger, number: int) -> None:
    """Takes back the record of a run that was refused before it began."""
    with ledger.change() as connection:
        connection.execute("DELETE FROM run_requests WHERE run = ?", (number,))
        connection.execute("DELETE FROM runs WHERE id = ?", (number,))


def _complete(ledger: Ledger, plan: _Plan, manifest: Mapping[str, Any], output: Path) -> None:
    """Records the result and marks the requests served, together."""
    before = manifest["model_sha256"]
    after = {name: manifest["output_sha256"].get(name) for name in before}
    digest = sha256_of(output / MANIFEST)
    with ledger.change() as connection:
        connection.execute(
            "UPDATE runs SET completed_at = ?, manifest_sha256 = ?, model_before = ?,"
            " model_after = ? WHERE id = ?",
            (now(), digest, json.dumps(before), json.dumps(after), plan.run),
        )
        for number in plan.requests:
            # Withdrawn while the run was under way: it was served all the same, and stays withdrawn.
            withdrawn = read_request(ledger, number).state == "withdrawn"
            state: State = "withdrawn" if withdrawn else "served"
            write_event(ledger, number, "served", state, run=plan.run)


def _numbers(numbers: Sequence[int]) -> str:
    return listed([str(number) for number in numbers])
