"""Requests as they come in and as they change: add, update, withdraw, reopen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from expunge.data.fingerprints import lasting, row_fingerprint, source_fingerprint
from expunge.data.formats import Role
from expunge.data.rows import Reading, RowSet, check_disjoint, listed
from expunge.errors import InputError
from expunge.ledger.dates import due_day, received_day
from expunge.ledger.material import rows_difference
from expunge.ledger.records import Request, State, read_request, write_event
from expunge.ledger.store import Ledger, LedgerPlace, open_ledger


@dataclass(frozen=True, kw_only=True)
class NewRequest(Reading):
    """What a request says."""

    forget: str
    """Rows to remove: a file, a directory with forget.*, or a hub data set id."""
    retain: str | None = None
    """Rows to keep whatever this request removes."""
    subject: str | None = None
    """Your reference for whoever asked: a case number rather than a name."""
    received: str | None = None
    """Day the request came in, such as 2026-11-21 (UTC); null: today."""
    due: str | None = None
    """Last day in time: a date, or days after it was received such as 30d."""

    def __post_init__(self) -> None:
        due_day(self.due, received_day(self.received))
        if self.subject is not None and not self.subject.strip():
            raise InputError("--subject: is empty; give a reference or leave it out")


@dataclass(frozen=True)
class Added:
    """A request as it was recorded."""

    request: Request
    known: Mapping[int, int]
    """How many of its rows are in earlier requests as well, by request."""


def add(place: LedgerPlace, new: NewRequest) -> Added:
    """Checks the rows as `run` does, and records them by id and fingerprint.

    Raises InputError with nothing written. A missing ledger is made.
    """
    forget = new.read(new.forget, "forget")
    retain = None if new.retain is None else new.read(new.retain, "retain")
    if retain is not None:
        check_disjoint(forget, retain)
    received = received_day(new.received)
    due = due_day(new.due, received)
    with open_ledger(place, create=True) as ledger:
        secret = ledger.secret()
        prints = [row_fingerprint(secret, row) for row in forget]
        with ledger.change() as connection:
            number = ledger.insert(
                "requests",
                subject=new.subject,
                received=received.isoformat(),
                due=None if due is None else due.isoformat(),
                forget=lasting(new.forget),
                forget_fingerprint=source_fingerprint(secret, forget.sha256),
                retain=None if new.retain is None else lasting(new.retain),
                retain_fingerprint=None if retain is None else source_fingerprint(secret, retain.sha256),
                columns=new.columns,
                joiner=new.joiner,
            )
            connection.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?)",
                [
                    (number, position, row.id, fingerprint)
                    for position, (row, fingerprint) in enumerate(zip(forget, prints, strict=True))
                ],
            )
            write_event(ledger, number, "added", "open")
            known = connection.execute(
                "SELECT request, count(DISTINCT fingerprint) FROM rows WHERE request < ? AND"
                " fingerprint IN (SELECT fingerprint FROM rows WHERE request = ?)"
                " GROUP BY request ORDER BY request",
                (number, number),
            ).fetchall()
            return Added(read_request(ledger, number), dict(known))


def update(
    place: LedgerPlace,
    number: int,
    *,
    forget: str | None = None,
    retain: str | None = None,
    due: str | None = None,
) -> Request:
    """Records that a file moved or was written anew, another retain set, or another last day.

    The rows of a request stay: a forget file with others is refused. Raises InputError.
    """
    if forget is None and retain is None and due is None:
        raise InputError("update: nothing to record; give --forget, --retain or --due")
    with open_ledger(place) as ledger:
        secret = ledger.secret()
        recorded = read_request(ledger, number)
        sources: dict[Role, str | None] = {"forget": forget, "retain": retain}
        given = {
            side: recorded.read(source, side, again=True)
            for side, source in sources.items()
            if source is not None
        }
        with ledger.change() as connection:
            request = read_request(ledger, number)
            if request.state == "withdrawn":
                raise InputError(f"request {number}: was withdrawn; add a new one")
            for side, rows in given.items():
                check = _check_same_rows if side == "forget" else _check_not_retained
                check(ledger, request, rows, secret)
                connection.execute(
                    f"UPDATE requests SET {side} = ?, {side}_fingerprint = ? WHERE id = ?",
                    (lasting(rows.source), source_fingerprint(secret, rows.sha256), number),
                )
            if due is not None:
                last = due_day(due, request.received)
                assert last is not None
                connection.execute(
                    "UPDATE requests SET due = ? WHERE id = ?", (last.isoformat(), number)
                )
            changed = [*given, *(["due"] if due is not None else [])]
            write_event(ledger, number, "updated", request.state, note=", ".join(changed))
            return read_request(ledger, number)


def withdraw(place: LedgerPlace, number: int) -> Request:
    """Records that a request is no longer to be served. Raises InputError where it was already."""
    refusals: dict[State, str] = {
        "withdrawn": "was withdrawn before",
        "served": "was served; a withdrawal does not bring its rows back",
        "verified": "was served and verified; a withdrawal does not bring its rows back",
    }
    return _move(place, number, "withdrawn", "withdrawn", refusals)


def reopen(place: LedgerPlace, number: int) -> Request:
    """Has the next run serve a request again. Raises InputError where it is open or withdrawn."""
    refusals: dict[State, str] = {
        "open": "is open; nothing to do",
        "withdrawn": "was withdrawn; add a new one",
    }
    return _move(place, number, "reopened", "open", refusals)


def _move(
    place: LedgerPlace, number: int, action: str, state: State, refusals: Mapping[State, str]
) -> Request:
    with open_ledger(place) as ledger, ledger.change():
        request = read_request(ledger, number)
        if request.state in refusals:
            raise InputError(f"request {number}: {refusals[request.state]}")
        write_event(ledger, number, action, state)
        return read_request(ledger, number)


def _check_same_rows(ledger: Ledger, request: Request, rows: RowSet, secret: bytes) -> None:
    difference = rows_difference(ledger, request, rows, secret)
    if difference is not None:
        raise InputError(
            f"--forget {rows.source}: is not what request {request.id} asked for ({difference});"
            f" withdraw it, and add a new one: expunge requests add --received {request.received}"
        )


def _check_not_retained(ledger: Ledger, request: Request, retain: RowSet, secret: bytes) -> None:
    found = ledger.connection.execute("SELECT fingerprint FROM rows WHERE request = ?", (request.id,))
    asked = {fingerprint for (fingerprint,) in found}
    both = [row.id for row in retain if row_fingerprint(secret, row) in asked]
    if both:
        raise InputError(
            f"--retain {retain.source}: {len(both)} rows are those that request {request.id} removes"
            f" (ids {listed(both)}); take them out"
        )
