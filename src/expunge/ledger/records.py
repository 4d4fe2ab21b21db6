"""What the ledger holds, as read from it: requests with their state, runs, verdicts, events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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


_SQLITE_INTEGERS = 2**63
_REQUESTS = """
    SELECT q.id, q.subject, q.received, q.due, q.forget, q.forget_fingerprint, q.retain,
        q.retain_fingerprint, q.at, q.actor, q.version,
        (SELECT state FROM events WHERE request = q.id ORDER BY id DESC LIMIT 1),
        (SELECT count(*) FROM rows WHERE request = q.id),
        (SELECT verdict FROM verdicts WHERE request = q.id ORDER BY id DESC LIMIT 1),
        q.columns, q.joiner
    FROM requests q"""


def read_requests(ledger: Ledger) -> list[Request]:
    """All requests by number."""
    return [_request(values) for values in ledger.connection.execute(f"{_REQUESTS} ORDER BY q.id")]


def read_request(ledger: Ledger, number: int) -> Request:
    """One request. Raises InputError where there is none of this number."""
    values = None
    if abs(number) < _SQLITE_INTEGERS:
        values = ledger.connection.execute(f"{_REQUESTS} WHERE q.id = ?", (number,)).fetchone()
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
    found = ledger.connection.execute(
        "SELECT id, output, model, retain, completed_at, manifest_sha256, model_before,"
        " model_after, at, actor, version FROM runs ORDER BY id"
    )
    return [
        RunRecord(*[*_parsed(values, 3, 6, 7), tuple(served.get(values[0], ()))]) for values in found
    ]


def read_verdicts(ledger: Ledger, number: int) -> list[VerdictRecord]:
    """A request's verdicts, the last one last."""
    found = ledger.connection.execute(
        "SELECT id, request, verdict, sentence, model, model_sha256, original_sha256, audit,"
        " audit_sha256, at, actor, version FROM verdicts WHERE request = ? ORDER BY id",
        (number,),
    )
    return [VerdictRecord(*_parsed(values, 5, 6)) for values in found]


def read_events(ledger: Ledger, number: int) -> list[Event]:
    """A request's history."""
    found = ledger.connection.execute(
        "SELECT id, request, action, state, run, verdict, note, at, actor, version FROM events"
        " WHERE request = ? ORDER BY id",
        (number,),
    )
    return [Event(*values) for values in found]


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
    ledger.connection.execute(
        "INSERT INTO events (request, action, state, run, verdict, note, at, actor, version)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (number, action, state, run, verdict, note, *ledger.stamp()),
    )


def _request(values: Sequence[Any]) -> Request:
    due = None if values[3] is None else date.fromisoformat(values[3])
    received = date.fromisoformat(values[2])
    *shown, columns, joiner = values[4:]
    return Request(values[0], values[1], received, due, *shown, columns=columns, joiner=joiner)


def _parsed(values: Sequence[Any], *columns: int) -> list[Any]:
    """The values with the JSON in these columns read."""
    return [_json(value) if n in columns else value for n, value in enumerate(values)]


def _json(text: str | None) -> Any:
    return None if text is None else json.loads(text)
