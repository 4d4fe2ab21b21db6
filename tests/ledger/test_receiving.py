"""Requests as they come in and change; the rows' files must be what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import pytest

from conftest import none_in, refusal, write_jsonl
from expunge.data.rows import Reading, RowSet, as_rows
from expunge.ledger.dates import today
from expunge.ledger.material import (
    RetainSet,
    check_sides,
    forget_rows,
    given_retain_set,
    join,
    retain_sets,
)
from expunge.ledger.receiving import Added, reopen, update, withdraw
from expunge.ledger.records import (
    OVERDUE_IN,
    Request,
    State,
    read_events,
    read_request,
    read_rows_of,
    write_event,
)
from expunge.ledger.store import LedgerPlace, open_ledger

Asked = Callable[..., Added]
KEY = b"k" * 32


def read_again(place: LedgerPlace, number: int) -> RowSet:
    with open_ledger(place) as ledger:
        return forget_rows(ledger, read_request(ledger, number), ledger.secret())


def move_to(place: LedgerPlace, state: State) -> None:
    with open_ledger(place) as ledger, ledger.change():
        write_event(ledger, 1, "moved by the test", state)


def test_a_request_is_recorded_with_its_days_and_rows(
    asked: Asked, place: LedgerPlace, subjects: list[Path], row_files: dict[str, Path]
) -> None:
    added = asked(
        subjects[0],
        subject="case-1",
        received="2026-01-05",
        due="30d",
        retain=str(row_files["retain"]),
    )
    request = added.request
    assert (request.id, request.state, request.rows) == (1, "open", 2)
    assert (request.received, request.due) == (date(2026, 1, 5), date(2026, 2, 4))
    assert (request.subject, request.actor) == ("case-1", "the tests")
    assert (request.forget, request.retain) == (str(subjects[0]), str(row_files["retain"]))
    with open_ledger(place) as ledger:
        assert [row_id for row_id, _ in read_rows_of(ledger, 1)] == ["ada00sc1", "ada00qa0"]
        assert [event.action for event in read_events(ledger, 1)] == ["added"]
    assert asked(subjects[1]).request.received == today()


def test_how_columns_were_read_is_recorded_and_read_again(
    asked: Asked, place: LedgerPlace, tmp_path: Path
) -> None:
    rows = [{"q": "Ada lives in", "a": "Paris.", "note": "some other words"}]
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    assert "has no column 'input'" in refusal(lambda: asked(path))
    request = asked(path, columns="prompt=q,output=a", joiner="\\n").request
    assert (request.columns, request.joiner) == ("prompt=q,output=a", "\\n")
    assert [row.text for row in read_again(place, 1)] == ["Ada lives in\nParis."]
    update(place, 1, forget=str(path.rename(tmp_path / "moved.jsonl")))
    assert [row.text for row in read_again(place, 1)] == ["Ada lives in\nParis."]


def test_rows_that_were_asked_for_before_are_counted(
    asked: Asked, subjects: list[Path], row_files: dict[str, Path]
) -> None:
    asked(subjects[0])
    asked(subjects[1])
    assert asked(row_files["forget"]).known == {1: 2, 2: 2}
    assert asked(subjects[1]).known == {2: 2, 3: 2}
    assert asked(row_files["nonmembers"]).known == {}


def test_wrong_input_is_refused_before_a_ledger_is_made(
    asked: Asked, place: LedgerPlace, tmp_path: Path, subjects: list[Path]
) -> None:
    secret = "canary-4711"
    faulty = write_jsonl(tmp_path / "faulty.jsonl", [{"input": secret, "output": ""}])
    for call in (
        lambda: asked(faulty),
        lambda: asked(tmp_path / "none.jsonl"),
        lambda: asked(subjects[0], retain=str(subjects[0])),
        lambda: asked(subjects[0], received="2999-01-01"),
        lambda: asked(subjects[0], due="soon"),
        lambda: asked(subjects[0], subject=" "),
    ):
        assert secret not in refusal(call)
        assert list(place.path.parent.iterdir()) == []


def test_overdue_is_what_is_still_to_be_done(asked: Asked, subjects: list[Path]) -> None:
    request = asked(subjects[0], received="2026-01-05", due="2026-02-04").request
    last = date(2026, 2, 4)
    assert not request.overdue(last)
    assert request.overdue(last + timedelta(days=1))
    for state in ("open", "served", "verified", "failed", "withdrawn"):
        moved = Request(**{**vars(request), "state": state})
        assert moved.overdue(date(2027, 1, 1)) == (state in OVERDUE_IN)
    assert not asked(subjects[1]).request.overdue(date(9999, 1, 1))


@pytest.mark.parametrize(
    ("state", "withdrawn", "reopened"),
    [
        ("open", None, "is open; nothing to do"),
        ("failed", None, None),
        ("served", "a withdrawal does not bring its rows back", None),
        ("verified", "a withdrawal does not bring its rows back", None),
        ("withdrawn", "was withdrawn before", "was withdrawn; add a new one"),
    ],
)
def test_from_which_state_a_request_is_withdrawn_or_reopened(
    state: State,
    withdrawn: str | None,
    reopened: str | None,
    asked: Asked,
    place: LedgerPlace,
    subjects: list[Path],
) -> None:
    for call, said, after in ((withdraw, withdrawn, "withdrawn"), (reopen, reopened, "open")):
        asked(subjects[0])
        move_to(place, state)
        if said is None:
            assert call(place, 1).state == after
        else:
            assert said in refusal(lambda call=call: call(place, 1))  # type: ignore[misc]
    assert "is not in" in refusal(lambda: withdraw(place, 77))


def test_a_file_that_changed_is_refused_and_one_that_moved_is_recorded(
    asked: Asked,
    place: LedgerPlace,
    tmp_path: Path,
    subjects: list[Path],
    forget_rows: list[dict[str, str]],
) -> None:
    asked(subjects[0])
    assert [row.id for row in read_again(place, 1)] == ["ada00sc1", "ada00qa0"]
    moved = subjects[0].rename(tmp_path / "moved.jsonl")
    message = refusal(lambda: read_again(place, 1))
    assert message.startswith(f"request 1: {subjects[0]}: no such file")
    assert "expunge requests update 1 --ledger" in message
    update(place, 1, forget=str(moved))
    assert len(read_again(place, 1)) == 2
    moved.write_text(moved.read_text() + "\n")  # the same rows in other bytes
    assert "all of its rows are the same" in refusal(lambda: read_again(place, 1))
    update(place, 1, forget=str(moved))
    assert len(read_again(place, 1)) == 2
    write_jsonl(moved, [forget_rows[0], forget_rows[3]])
    message = refusal(lambda: read_again(place, 1))
    assert "has changed since it was recorded (1 of 2 rows are gone, 1 are new)" in message
    message = refusal(lambda: update(place, 1, forget=str(moved)))
    assert "is not what request 1 asked for (1 of 2 rows are gone, 1 are new)" in message
    assert "withdraw it, and add a new one: expunge requests add --received" in message
    with open_ledger(place) as ledger:
        notes = [event.note for event in read_events(ledger, 1) if event.action == "updated"]
    assert notes == ["forget", "forget"]


def test_a_retain_set_is_replaced_and_must_not_hold_what_is_to_go(
    asked: Asked, place: LedgerPlace, subjects: list[Path], row_files: dict[str, Path]
) -> None:
    asked(subjects[0], retain=str(row_files["retain"]))
    message = refusal(lambda: update(place, 1, retain=str(row_files["forget"])))
    assert "2 rows are those that request 1 removes (ids ada00sc1, ada00qa0)" in message
    changed = update(place, 1, retain=str(subjects[1]), due="2999-01-01")
    assert (changed.retain, changed.due) == (str(subjects[1]), date(2999, 1, 1))
    subjects[1].write_text(subjects[1].read_text() + "\n")
    with open_ledger(place) as ledger:
        message = refusal(lambda: retain_sets(ledger, [changed], None, ledger.secret()))
    assert "the retain set of request 1" in message
    assert "expunge requests update 1" in message
    assert "nothing to record" in refusal(lambda: update(place, 1))
    withdraw(place, 1)
    assert "was withdrawn; add a new one" in refusal(lambda: update(place, 1, due="3d"))


def test_one_retain_set_that_several_requests_name_counts_once(
    asked: Asked, place: LedgerPlace, subjects: list[Path], row_files: dict[str, Path]
) -> None:
    retain = str(row_files["retain"])
    requests = [asked(path, retain=retain).request for path in subjects[:2]]
    with open_ledger(place) as ledger:
        found = retain_sets(ledger, requests, None, ledger.secret())
        with_given = retain_sets(
            ledger,
            requests,
            given_retain_set(Reading(), str(subjects[3]), ledger.secret()),
            ledger.secret(),
        )
    assert [each.name for each in found] == ["the retain set of request 1"]
    assert [each.name for each in with_given] == ["--retain", "the retain set of request 1"]


def rows_of(*pairs: tuple[str, str], id: str = "r") -> RowSet:
    return as_rows(
        [{"id": f"{id}{n}", "input": a, "output": b} for n, (a, b) in enumerate(pairs)], "forget"
    )


ADA, BEN, EVA = ("Ada lives in", "Oslo"), ("Ben lives in", "Rome"), ("Eva lives in", "Lima")


def test_joined_rows_are_each_there_once_under_ids_of_their_own() -> None:
    sets = {"1": rows_of(ADA, BEN), "2": rows_of(BEN, EVA), "3": rows_of(ADA, id="x")}
    joined, twice = join(sets, KEY, "requests 1, 2, 3")
    assert [(row.id, row.output) for row in joined] == [
        ("r0", "Oslo"),
        ("r1", "Rome"),
        ("2:r1", "Lima"),
    ]
    assert twice == 2
    again, _ = join(sets, KEY, "requests 1, 2, 3")
    assert again.sha256 == joined.sha256
    other, _ = join(sets, b"o" * 32, "requests 1, 2, 3")
    assert list(other.sha256.values()) != list(joined.sha256.values())


def test_joining_one_set_changes_nothing() -> None:
    rows = rows_of(ADA, BEN)
    assert join({"1": rows}, KEY, "x")[0].rows == rows.rows
    assert join({"1": rows, "2": rows}, KEY, "x")[0].rows == rows.rows


def test_a_row_that_is_to_go_and_to_stay_is_refused_with_its_id() -> None:
    kept = RetainSet("the retain set of request 7", "r.jsonl", "f", rows_of(EVA, BEN, id="kept"))
    check_sides({1: rows_of(ADA)}, {}, [kept], KEY)
    message = refusal(lambda: check_sides({1: rows_of(ADA, BEN)}, {}, [kept], KEY))
    assert message.startswith("request 1: 1 of its rows are in the retain set of request 7")
    assert "(ids r1)" in message
    assert "expunge requests update" in message
    assert "Rome" not in message


def test_a_row_that_has_gone_is_not_retained_again(tmp_path: Path) -> None:
    from expunge.data.fingerprints import row_fingerprint

    path = write_jsonl(tmp_path / "r.jsonl", [{"id": "b", "input": BEN[0], "output": BEN[1]}])
    kept = given_retain_set(Reading(), str(path), KEY)
    erased = {4: {row_fingerprint(KEY, row) for row in rows_of(BEN, EVA)}}
    message = refusal(lambda: check_sides({}, erased, [kept], KEY))
    assert message.startswith("--retain: ")
    assert "holds 1 rows that request 4 removed (ids b)" in message
    assert "update" not in message  # what is given is not recorded
    check_sides({}, {4: {row_fingerprint(KEY, row) for row in rows_of(ADA)}}, [kept], KEY)


def test_the_ledger_holds_no_text(
    asked: Asked, place: LedgerPlace, row_files: dict[str, Path], forget_rows: list[dict[str, str]]
) -> None:
    """The log is searched while it is there."""
    texts = [row[column] for row in forget_rows for column in ("input", "output")]
    texts += [word for row in forget_rows for word in row["output"].split() if len(word) > 6]
    asked(row_files["forget"])
    with open_ledger(place) as held:
        asked(row_files["forget"], retain=str(row_files["retain"]), subject="case-1")
        names = none_in(texts, place.path.parent)
        assert held.connection.execute("SELECT count(*) FROM rows").fetchone()[0] == 16
    assert {"ledger.db", "ledger.db-wal", "ledger.db.secret"} <= set(names)
    assert b"ada00sc1" in (place.path.parent / "ledger.db").read_bytes()
