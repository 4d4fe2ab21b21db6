"""The rows of recorded requests, read again from where they are, and joined for one run.

The text is with the user only. What is read must be what was recorded, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from expunge.data.fingerprints import lasting, row_fingerprint, rows_fingerprint, source_fingerprint
from expunge.data.formats import Role
from expunge.data.rows import Reading, Row, RowSet, listed
from expunge.errors import InputError
from expunge.ledger.records import Request, read_rows_of
from expunge.ledger.store import Ledger


@dataclass(frozen=True)
class RetainSet:
    """Rows that must stay, and on whose word."""

    name: str
    """For messages: "--retain" or "the retain set of request 3"."""
    source: str
    fingerprint: str
    rows: RowSet
    reading: Reading = field(default_factory=Reading)

    def to_json(self) -> dict[str, str | None]:
        """Without the rows."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "columns": self.reading.columns,
            "joiner": self.reading.joiner,
        }


def forget_rows(ledger: Ledger, request: Request, secret: bytes) -> RowSet:
    """A request's rows. Raises InputError where the file is gone or holds something else now."""
    again = (
        f"put the recorded file back, or if it only moved or was written anew, record it with"
        f" expunge requests update {request.id} --ledger {ledger.place.path} --forget FILE"
    )
    rows = _read(request, request.forget, "forget", f"request {request.id}", again)
    if source_fingerprint(secret, rows.sha256) != request.forget_fingerprint:
        difference = rows_difference(ledger, request, rows, secret) or "all of its rows are the same"
        raise InputError(
            f"request {request.id}: {request.forget} has changed since it was recorded"
            f" ({difference}); {again}"
        )
    return rows


def rows_difference(ledger: Ledger, request: Request, rows: RowSet, secret: bytes) -> str | None:
    """In what `rows` are not those that were recorded, by number; None where they are."""
    recorded = sorted(fingerprint for _, fingerprint in read_rows_of(ledger, request.id))
    found = sorted(row_fingerprint(secret, row) for row in rows)
    if recorded == found:
        return None
    gone, new = set(recorded) - set(found), set(found) - set(recorded)
    return f"{len(gone)} of {len(recorded)} rows are gone, {len(new)} are new"


def given_retain_set(reading: Reading, source: str, secret: bytes, *, again: bool = False) -> RetainSet:
    """The rows that --retain names, or did when they were recorded (`again`)."""
    rows = reading.read(source, "retain", again=again)
    fingerprint = source_fingerprint(secret, rows.sha256)
    return RetainSet("--retain", lasting(source), fingerprint, rows, reading)


def retain_sets(
    ledger: Ledger, requests: Iterable[Request], given: RetainSet | None, secret: bytes
) -> list[RetainSet]:
    """The given retain set, and those of the requests. Raises InputError where one has changed."""
    found = [] if given is None else [given]
    for request in requests:
        if request.retain is None:
            continue
        name = f"the retain set of request {request.id}"
        again = (
            "put the recorded file back, or record the new one with expunge requests update"
            f" {request.id} --ledger {ledger.place.path} --retain FILE"
        )
        rows = _read(request, request.retain, "retain", name, again)
        fingerprint = source_fingerprint(secret, rows.sha256)
        if fingerprint != request.retain_fingerprint:
            raise InputError(f"{name}: {request.retain} has changed since it was recorded; {again}")
        if fingerprint not in {each.fingerprint for each in found}:
            found.append(RetainSet(name, request.retain, fingerprint, rows, request))
    return found


def check_sides(
    forget: Mapping[int, RowSet],
    erased: Mapping[int, set[str]],
    retain: Sequence[RetainSet],
    secret: bytes,
) -> None:
    """Raises InputError, with ids, for a row that is to go, or has gone, and is to stay as well.

    `forget` holds the rows of the requests to serve; `erased` the fingerprints of those that the
    model has lost already, by request: to retain one would teach it again.
    """
    for kept in retain:
        ids = {row_fingerprint(secret, row): row.id for row in kept.rows}
        for number, rows in forget.items():
            both = [row.id for row in rows if row_fingerprint(secret, row) in ids]
            if both:
                raise InputError(
                    f"request {number}: {len(both)} of its rows are in {kept.name}, {kept.source}, as"
                    f" well (ids {listed(both)}); take them out there{_recorded(kept)}, or withdraw the"
                    " request"
                )
        for number, gone in erased.items():
            back = [ids[fingerprint] for fingerprint in ids if fingerprint in gone]
            if back:
                raise InputError(
                    f"{kept.name}: {kept.source} holds {len(back)} rows that request {number}"
                    f" removed (ids {listed(back)}); retained they would be learned again: take"
                    f" them out{_recorded(kept)}"
                )


def join(sets: Mapping[str, RowSet], secret: bytes, source: str) -> tuple[RowSet, int]:
    """One set of several, each row once, and how many were there twice.

    Where an id of a later set is taken, all ids of that set are prefixed with its name. The digest
    is keyed, because the SHA-256 of a small set could be guessed as its text can.
    """
    rows: list[Row] = []
    fingerprints: dict[str, None] = {}
    taken: set[str] = set()
    twice = 0
    for name, part in sets.items():
        new = []
        for row in part:
            fingerprint = row_fingerprint(secret, row)
            if fingerprint in fingerprints:
                twice += 1
            else:
                fingerprints[fingerprint] = None
                new.append(row)
        # An id that is taken marks all ids of its set.
        prefix = f"{name}:" if any(row.id in taken for row in new) else ""
        renamed = [replace(row, id=f"{prefix}{row.id}") for row in new]
        rows += renamed
        taken |= {row.id for row in renamed}
    digest = rows_fingerprint(secret, fingerprints)
    return RowSet(tuple(rows), source, {f"{source} (keyed)": digest}), twice


def _recorded(kept: RetainSet) -> str:
    return "" if kept.name == "--retain" else " and record it with expunge requests update"


def _read(reading: Reading, source: str, role: Role, name: str, again: str) -> RowSet:
    try:
        return reading.read(source, role, again=True)
    except InputError as error:
        raise InputError(f"{name}: {error} - {again}") from None
