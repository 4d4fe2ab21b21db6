"""What the ledger holds, as read from it: requests with their state, runs, verdicts, events.

And which erasures a model carries, by the hashes of its weights and the runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from typing import Any, Literal

from expunge.data.rows import Reading
from expunge.errors import InputError
from expunge.ledger.store import Ledger

State = Literal["open", "served", "verified", "failed", "withdrawn"]
OVERDUE_IN: tuple[State, ...] = ("open", "failed")
"""States in which something is still to be done."""


@dataclass(frozen=True)
class Request(Reading):
    """One erasure request."""

    id: int
    subject: str | None
    """The user's reference, such as a case number."""
    received: date
    due: date | None
    """Last day in time, in UTC."""
    forget: str
    """Where the rows are; their text is there only."""
    forget_fingerprint: str
    retain: str | None
    retain_fingerprint: str | None
    at: str
    actor: str
    version: str
    state: State
    rows: int
    verdict: str | None
    """Of the last audit; None where there was none, or it could not tell."""

    def overdue(self, on: date) -> bool:
        """Whether its day has passed and it is neither served nor withdrawn."""
        return self.due is not None and on > self.due and self.state in OVERDUE_IN

    def to_json(self, on: date) -> dict[str, Any]:
        """For `list --json` and the evidence."""
        return asdict(self) | {
            "received": self.received.isoformat(),
            "due": None if self.due is None else self.due.isoformat(),
            "overdue": self.overdue(on),
        }


@dataclass(frozen=True)
class RunRecord:
    """One run that served requests, or was begun for them."""

    id: int
    output: str
    model: str
    retain: Sequence[Mapping[str, str]]
    """Source and fingerprint of each retain set, and how its columns were read."""
    completed_at: str | None
    """None: unfinished, or given up for another run with the same output."""
    manifest_sha256: str | None
    """Of expunge.json in its output."""
    model_before: Mapping[str, str] | None
    """SHA-256 of the files of the model that it began with."""
    model_after: Mapping[str, str] | None
    """Of the same files in its output."""
    at: str
    actor: str
    version: str
    requests: Sequence[int]


@dataclass(frozen=True)
class VerdictRecord:
    """What one audit said of one request."""

    id: int
    request: int
    verdict: str | None
    sentence: str
    model: str
    model_sha256: Mapping[str, str]
    original_sha256: Mapping[str, str]
    audit: str
    """The file of this request's audit."""
    audit_sha256: str
    at: str
    actor: str
    version: str


@dataclass(frozen=True)
class Event:
    """One line of a request's history."""

    id: int
    request: int
    action: str
    state: State
    """The request's state from here on."""
    run: int | None
    verdict: int | None
    note: str | None
    at: str
    actor: str
    version: str


_REQUESTS = """
    SELECT q.*,
        (SELECT state FROM events WHERE request = q.id ORDER BY id DESC LIMIT 1) AS state,
        (SELECT count(*) FROM rows WHERE request = q.id) AS rows,
        (SELECT verdict FROM verdicts WHERE request = q.id ORDER BY id DESC LIMIT 1) AS verdict
    FROM requests q"""
_JSON = ("model_before", "model_after", "model_sha256", "original_sha256")
"""Columns that hold JSON; of runs `retain` does too."""


def read_requests(ledger: Ledger) -> list[Request]:
    """All requests by number."""
    return [_request(values) for values in _records(ledger, f"{_REQUESTS} ORDER BY q.id")]


def read_request(ledger: Ledger, number: int) -> Request:
    """One request. Raises InputError where there is none of this number."""
    # SQLite takes no larger number.
    found = _records(ledger, f"{_REQUESTS} WHERE q.id = ?", number) if abs(number) < 2**63 else ()
    values = next(iter(found), None)
    if values is None:
        count = ledger.connection.execute("SELECT count(*) FROM requests").fetchone()[0]
        held = f"it holds 1 to {count}" if count else "it holds none yet"
        raise InputError(f"request {number}: is not in {ledger.place.path}; {held}")
    return _request(values)


def read_rows_of(ledger: Ledger, number: int) -> list[tuple[str, str]]:
    """Id and fingerprint of a request's rows, in their order."""
    return ledger.connection.execute(
        "SELECT id, fingerprint FROM rows WHERE request = ? ORDER BY position", (number,)
    ).fetchall()


def read_runs(ledger: Ledger) -> list[RunRecord]:
    """All runs by number, unfinished ones too."""
    served: dict[int, list[int]] = {}
    for run, request in ledger.connection.execute(
        "SELECT run, request FROM run_requests ORDER BY run, request"
    ):
        served.setdefault(run, []).append(request)
    return [
        RunRecord(
            **{**values, "retain": json.loads(values["retain"])},
            requests=tuple(served.get(values["id"], ())),
        )
        for values in _records(ledger, "SELECT * FROM runs ORDER BY id")
    ]


def read_verdicts(ledger: Ledger, number: int) -> list[VerdictRecord]:
    """A request's verdicts, the last one last."""
    verdicts = "SELECT * FROM verdicts WHERE request = ? ORDER BY id"
    return [VerdictRecord(**values) for values in _records(ledger, verdicts, number)]


def read_events(ledger: Ledger, number: int) -> list[Event]:
    """A request's history."""
    events = "SELECT * FROM events WHERE request = ? ORDER BY id"
    return [Event(**values) for values in _records(ledger, events, number)]


def write_event(
    ledger: Ledger,
    number: int,
    action: str,
    state: State,
    *,
    run: int | None = None,
    verdict: int | None = None,
    note: str | None = None,
) -> None:
    """Adds a line to a request's history, inside the transaction that is open."""
    told = {"run": run, "verdict": verdict, "note": note}
    ledger.insert("events", request=number, action=action, state=state, **told)


def weights_of(sha256: Mapping[str, str]) -> frozenset[str]:
    """The hashes of a model's weights alone: another tokenizer file makes no other model."""
    return frozenset(v for name, v in sha256.items() if name.endswith(".safetensors"))


def carried(weights: frozenset[str], runs: Sequence[RunRecord]) -> set[int]:
    """Requests that the runs served which led to a model of these weights.

    A run's output begins where its model ended, so this goes back from run to run.
    """
    found: set[int] = set()
    passed: set[int] = set()
    ahead = [weights]
    while ahead:
        now = ahead.pop()
        for run in runs:
            if run.id in passed or run.model_after is None or run.model_before is None:
                continue
            if weights_of(run.model_after) == now:
                passed.add(run.id)
                found |= set(run.requests)
                ahead.append(weights_of(run.model_before))
    return found


def _records(ledger: Ledger, question: str, *values: Any) -> Iterator[dict[str, Any]]:
    """What is found, by column."""
    found = ledger.connection.execute(question, values)
    names = [column for column, *_ in found.description]
    for line in found:
        named = dict(zip(names, line, strict=True))
        yield named | {name: json.loads(named[name]) for name in _JSON if named.get(name) is not None}


def _request(values: Mapping[str, Any]) -> Request:
    known = {field.name: values[field.name] for field in fields(Request)}
    for name in ("received", "due"):
        known[name] = None if known[name] is None else date.fromisoformat(known[name])
    return Request(**known)
