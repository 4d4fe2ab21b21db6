"""The ledger's file: whole whatever happens to the process, the disk or the file."""

from __future__ import annotations

import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import refusal, write_jsonl
from expunge.errors import RunError
from expunge.ledger import schema, store
from expunge.ledger.receiving import Added, NewRequest, add
from expunge.ledger.records import read_events, read_request, read_requests, read_rows_of
from expunge.ledger.store import Ledger, LedgerPlace, open_ledger

Asked = Callable[..., Added]
_ADD = """
import sys
import threading
from expunge.ledger.receiving import NewRequest, add
from expunge.ledger.store import LedgerPlace
add(LedgerPlace(sys.argv[1], by=sys.argv[3]), NewRequest(forget=sys.argv[2]))
"""
_KILLED = """
import os, signal, sys
from expunge.ledger import receiving, store
def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def entered(context: AbstractContextManager[object]) -> Callable[[], object]:
    return context.__enter__


def start(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE)


def numbers(place: LedgerPlace) -> list[int]:
    with open_ledger(place) as ledger:
        return [request.id for request in read_requests(ledger)]


def interrupted(ledger: Ledger) -> None:
    with ledger.change() as connection:
        connection.execute("UPDATE requests SET subject = 'x'")
        raise KeyboardInterrupt


def is_whole(place: LedgerPlace) -> bool:
    connection = sqlite3.connect(place.path)
    broken = connection.execute("PRAGMA foreign_key_check").fetchall()
    answer = connection.execute("PRAGMA integrity_check").fetchone()[0]
    connection.close()
    return bool(answer == "ok" and not broken)


def test_the_file_says_what_it_is_and_who_wrote_what(
    asked: Asked, place: LedgerPlace, subjects: list[Path]
) -> None:
    asked(subjects[0])
    with open_ledger(place) as ledger:
        one = ledger.connection.execute
        assert one("PRAGMA application_id").fetchone()[0] == schema.APPLICATION_ID
        assert one("PRAGMA user_version").fetchone()[0] == len(schema.MIGRATIONS)
        assert one("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert one("PRAGMA foreign_keys").fetchone()[0] == 1
        for table in ("identity", "requests", "events"):
            for at, actor, version in one(f"SELECT at, actor, version FROM {table}"):
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", at)
                assert (actor, version.count(".")) == ("the tests", 2)
    for path in (place.path, place.secret_path):
        assert path.stat().st_mode & 0o077 == 0


def test_history_and_rows_are_never_changed(
    asked: Asked, place: LedgerPlace, subjects: list[Path]
) -> None:
    asked(subjects[0])
    with open_ledger(place) as ledger:
        for command in (
            "UPDATE events SET state = 'verified'",
            "DELETE FROM events",
            "DELETE FROM rows",
            "UPDATE rows SET id = 'x'",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="never changed"):
                ledger.connection.execute(command)
        assert read_request(ledger, 1).state == "open"


def test_a_ledger_made_while_it_is_looked_at_is_no_other_database(
    place: LedgerPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> None:
        with open_ledger(place, create=True):
            pass

    owner = store._owner
    others: list[threading.Thread] = []

    def slowly(connection: sqlite3.Connection) -> int:
        found = owner(connection)
        if not others:  # the first to look; the other one looks as well
            others.append(threading.Thread(target=make))
            others[0].start()
            others[0].join(0.3)
        return found

    monkeypatch.setattr(store, "_owner", slowly)
    make()
    others[0].join()
    with open_ledger(place) as ledger:
        assert ledger.secret()


def test_processes_that_add_at_once_lose_nothing(place: LedgerPlace, subjects: list[Path]) -> None:
    """They make the ledger and its secret together as well."""
    names = [f"writer {number}" for number in range(6)]
    started = [start(_ADD, place.ledger, subjects[n % 4], name) for n, name in enumerate(names)]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 6, errors
    assert numbers(place) == [1, 2, 3, 4, 5, 6]
    with open_ledger(place) as ledger:
        assert {request.actor for request in read_requests(ledger)} == set(names)
        assert all(len(read_rows_of(ledger, number)) == 2 for number in range(1, 7))
        ledger.secret()
    assert is_whole(place)


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("receiving.write_event", [1]),  # request and rows are written, not committed
        ("store._identify", [1]),
        ("store.secret_check", [1]),  # the secret is there, the ledger does not know it yet
    ],
)
def test_a_kill_in_the_middle_leaves_all_or_nothing(
    where: str, left: list[int], place: LedgerPlace, subjects: list[Path], asked: Asked
) -> None:
    if where == "receiving.write_event":
        asked(subjects[1])
    process = start(f"{_KILLED}\n{where} = killed\n{_ADD}", place.ledger, subjects[0], "killed")
    assert process.wait() == -signal.SIGKILL
    if where == "receiving.write_event":
        assert numbers(place) == left
    after = asked(subjects[2])
    assert after.request.id == left[-1] + (where == "receiving.write_event")
    assert after.request.rows == 2
    assert is_whole(place)


def test_what_was_committed_outlives_a_kill(
    asked: Asked, place: LedgerPlace, subjects: list[Path]
) -> None:
    """The log was not yet copied into the file."""
    asked(subjects[0])
    # A second connection keeps the log from being copied as the first one closes.
    held = "held = store.open_ledger(store.LedgerPlace(sys.argv[1]))\nheld.__enter__()"
    code = f"{_KILLED}\n{held}\n{_ADD}\nkilled()"
    process = start(code, place.ledger, subjects[1], "second")
    assert process.wait() == -signal.SIGKILL
    assert place.path.with_name("ledger.db-wal").stat().st_size > 0
    assert numbers(place) == [1, 2]
    assert is_whole(place)


def test_a_failed_change_is_undone(asked: Asked, place: LedgerPlace, subjects: list[Path]) -> None:
    asked(subjects[0])
    with open_ledger(place) as ledger:
        with pytest.raises(KeyboardInterrupt):
            interrupted(ledger)
        assert read_request(ledger, 1).subject is None
        assert not ledger.connection.in_transaction


def test_a_full_disk_is_one_line_and_nothing_is_half_there(
    asked: Asked,
    place: LedgerPlace,
    tmp_path: Path,
    subjects: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked(subjects[0])
    many = write_jsonl(
        tmp_path / "many.jsonl", [{"input": f"row {n}", "output": "x"} for n in range(3000)]
    )
    prepare = store._prepare

    def full(connection: sqlite3.Connection, at: LedgerPlace) -> None:
        prepare(connection, at)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_prepare", full)
        with pytest.raises(RunError) as caught:
            asked(many)
    assert "the disk is full or faulty (SQLITE_FULL); nothing was changed" in str(caught.value)
    assert numbers(place) == [1]
    assert asked(many).request.rows == 3000
    assert is_whole(place)


def test_a_disk_that_refuses_to_write_is_one_line(
    asked: Asked, place: LedgerPlace, tmp_path: Path, subjects: list[Path]
) -> None:
    """A real limit on the size of files, in a process of its own."""
    asked(subjects[0])
    many = write_jsonl(
        tmp_path / "many.jsonl", [{"input": f"row {n}", "output": "x"} for n in range(3000)]
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "expunge",
            "requests",
            "add",
            "--ledger",
            place.ledger,
            "--forget",
            many,
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)),
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the disk is full or faulty" in done.stderr
    assert numbers(place) == [1]


def test_a_file_that_may_not_be_written_is_one_line(
    asked: Asked, place: LedgerPlace, subjects: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so that the file is opened for reading stands for its permissions."""
    asked(subjects[0])
    prepare = store._prepare

    def read_only(connection: sqlite3.Connection, at: LedgerPlace) -> None:
        prepare(connection, at)
        connection.execute("PRAGMA query_only = ON")

    monkeypatch.setattr(store, "_prepare", read_only)
    message = refusal(lambda: asked(subjects[1]))
    assert message.startswith(f"--ledger {place.path}: the file or its directory cannot be written")
    assert numbers(place) == [1]


def test_a_ledger_that_is_held_is_one_line(
    asked: Asked, place: LedgerPlace, subjects: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(subjects[0])
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    holder = sqlite3.connect(place.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunError, match=r"another process has held it for 0\.1 s; nothing was changed"):
        asked(subjects[1])
    holder.execute("ROLLBACK")
    holder.close()
    assert asked(subjects[1]).request.id == 2


def test_a_newer_schema_is_refused(asked: Asked, place: LedgerPlace, subjects: list[Path]) -> None:
    asked(subjects[0])
    connection = sqlite3.connect(place.path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    message = refusal(entered(open_ledger(place)))
    assert (
        f"was written by a newer expunge (schema 99, this one knows {len(schema.MIGRATIONS)})" in message
    )
    assert "update expunge" in message


def test_an_older_schema_is_brought_up_to_date(
    asked: Asked, place: LedgerPlace, subjects: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(subjects[0], subject="case-1")
    step = ("ALTER TABLE requests ADD COLUMN colour TEXT DEFAULT 'grey'",)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
    monkeypatch.setattr(store, "MIGRATIONS", schema.MIGRATIONS)
    for _ in range(2):  # the second finds it done
        with open_ledger(place) as ledger:
            assert ledger.connection.execute("SELECT colour FROM requests").fetchall() == [("grey",)]
            assert read_request(ledger, 1).subject == "case-1"
            assert schema.version_of(ledger.connection) == len(schema.MIGRATIONS)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "is a directory; name a file"),
        (lambda path: path.write_text('{"input": "secret"}'), "is no ledger; name another file"),
        (lambda path: sqlite3.connect(path).executescript("CREATE TABLE t (x)"), "something else"),
        (lambda path: None, "no such file; expunge requests add makes a ledger"),
    ],
)
def test_what_is_no_ledger_is_refused_and_left_alone(
    make: Callable[[Path], object], said: str, place: LedgerPlace
) -> None:
    make(place.path)
    before = place.path.read_bytes() if place.path.is_file() else None
    message = refusal(entered(open_ledger(place)))
    assert message.startswith(f"--ledger {place.path}: ")
    assert said in message
    assert (place.path.read_bytes() if place.path.is_file() else None) == before
    assert not place.secret_path.exists()


def test_a_damaged_ledger_is_one_line(asked: Asked, place: LedgerPlace, subjects: list[Path]) -> None:
    asked(subjects[0])
    content = bytearray(place.path.read_bytes())
    content[100:] = os.urandom(len(content) - 100)
    place.path.write_bytes(content)
    assert "is damaged; put a backup in its place" in refusal(lambda: numbers(place))


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE events", "DROP TABLE identity", "DROP TRIGGER rows_delete",
        "DELETE FROM identity", "DROP TRIGGER events_delete; DELETE FROM events",
        "UPDATE requests SET received = 'yesterday'", "UPDATE requests SET due = '2026-02-30'",
        "UPDATE requests SET received = x'ff'", "UPDATE requests SET subject = CAST(x'ff' AS TEXT)",
        "UPDATE identity SET actor = x'ff'", "UPDATE identity SET only_one = 2",
        "INSERT INTO runs VALUES (1, 'o', 'm', '[', NULL, NULL, NULL, NULL, 'a', 'b', 'c')",
        "INSERT INTO runs VALUES (1, 'o', 'm', '{}', NULL, NULL, NULL, NULL, 'a', 'b', 'c')",
        "INSERT INTO run_requests VALUES (7, 7)", "CREATE TABLE more (x)",
    ],
)  # fmt: skip
def test_a_ledger_that_something_else_changed_is_damaged(
    change: str, asked: Asked, place: LedgerPlace, subjects: list[Path]
) -> None:
    asked(subjects[0])
    connection = sqlite3.connect(place.path)
    connection.executescript(f"PRAGMA ignore_check_constraints = ON; {change}")
    connection.commit()
    connection.close()
    assert "is damaged; put a backup in its place" in refusal(lambda: numbers(place))


def test_an_empty_file_becomes_a_ledger_by_adding_only(
    asked: Asked, place: LedgerPlace, subjects: list[Path]
) -> None:
    place.path.touch()
    assert "is no ledger" in refusal(lambda: numbers(place))
    assert place.path.read_bytes() == b""
    assert asked(subjects[0]).request.id == 1


def test_without_its_secret_a_ledger_is_read_but_takes_no_rows(
    asked: Asked, place: LedgerPlace, subjects: list[Path], tmp_path: Path
) -> None:
    asked(subjects[0])
    moved = tmp_path / "elsewhere.secret"
    place.secret_path.rename(moved)
    assert numbers(place) == [1]
    assert "put it back from a backup or give it with --secret" in refusal(lambda: asked(subjects[1]))
    there = replace(place, secret=str(moved))
    assert add(there, NewRequest(forget=str(subjects[1]))).request.id == 2
    moved.write_text("ab" * 32 + "\n")
    assert "is not the secret of" in refusal(lambda: add(there, NewRequest(forget=str(subjects[1]))))
    moved.write_text("too short")
    assert "64 hexadecimal digits" in refusal(lambda: add(there, NewRequest(forget=str(subjects[1]))))
    assert numbers(place) == [1, 2]


@pytest.mark.parametrize(
    ("secret", "said"),
    [("no/secret", "--secret {}: its directory does not exist"), ("rows", "is no ledger's secret")],
)
def test_a_new_ledger_with_a_wrong_secret_is_not_made(
    secret: str, said: str, place: LedgerPlace, subjects: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "rows").write_text("no key")
    there = replace(place, secret=str(tmp_path / secret))
    message = refusal(lambda: add(there, NewRequest(forget=str(subjects[0]))))
    assert said.format(tmp_path / secret) in message
    assert not place.path.exists()


def test_several_questions_see_one_state(asked: Asked, place: LedgerPlace, subjects: list[Path]) -> None:
    asked(subjects[0])
    with open_ledger(place) as ledger, ledger.reading():
        assert read_request(ledger, 1).state == "open"
        asked(subjects[1])
        with open_ledger(place) as other, other.change():
            assert isinstance(other, Ledger)
            other.connection.execute("UPDATE requests SET subject = 'later'")
        assert [request.id for request in read_requests(ledger)] == [1]
        assert read_request(ledger, 1).subject is None
        assert len(read_events(ledger, 1)) == 1


def test_a_new_ledger_that_does_not_fit_leaves_nothing(place: LedgerPlace, subjects: list[Path]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        message = refusal(entered(open_ledger(place, create=True)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"--ledger {place.path}: ")
    assert "raise the limit" in message
    assert not place.path.exists()
    place.path.symlink_to(place.path.name)
    assert "leads to itself" in refusal(entered(open_ledger(place, create=True)))
    null = replace(place, ledger=os.devnull)
    assert "is a device" in refusal(entered(open_ledger(null, create=True)))
