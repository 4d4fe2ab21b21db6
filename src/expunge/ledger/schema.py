"""The ledger's tables, version by version.

`user_version` of the file is the number of steps that were taken. A step that was ever released is
never edited; a change is one more step at the end.

Every record carries who wrote it (`actor`), when (`at`, UTC) and with which version of expunge.
A request's state is that of its last event, and events and verdicts are never changed or deleted.
"""

from __future__ import annotations

import sqlite3

APPLICATION_ID = 0x4558504C
"""Marks the file as a ledger: "EXPL"."""

_STAMP = "at TEXT NOT NULL, actor TEXT NOT NULL, version TEXT NOT NULL"

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        f"""CREATE TABLE identity (
            only_one INTEGER PRIMARY KEY CHECK (only_one = 1),
            secret_check TEXT NOT NULL,
            {_STAMP})""",
        f"""CREATE TABLE requests (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            subject TEXT,
            received TEXT NOT NULL,
            due TEXT,
            forget TEXT NOT NULL,
            forget_fingerprint TEXT NOT NULL,
            retain TEXT,
            retain_fingerprint TEXT,
            {_STAMP},
            CHECK ((retain IS NULL) = (retain_fingerprint IS NULL)))""",
        """CREATE TABLE rows (
            request INTEGER NOT NULL REFERENCES requests (id),
            position INTEGER NOT NULL,
            id TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            PRIMARY KEY (request, position))""",
        "CREATE INDEX rows_by_fingerprint ON rows (fingerprint)",
        f"""CREATE TABLE runs (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            output TEXT NOT NULL,
            model TEXT NOT NULL,
            retain TEXT NOT NULL,
            completed_at TEXT,
            manifest_sha256 TEXT,
            model_before TEXT,
            model_after TEXT,
            {_STAMP},
            CHECK ((completed_at IS NULL) = (manifest_sha256 IS NULL)))""",
        """CREATE TABLE run_requests (
            run INTEGER NOT NULL REFERENCES runs (id),
            request INTEGER NOT NULL REFERENCES requests (id),
            PRIMARY KEY (run, request))""",
        f"""CREATE TABLE verdicts (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            request INTEGER NOT NULL REFERENCES requests (id),
            verdict TEXT,
            sentence TEXT NOT NULL,
            model TEXT NOT NULL,
            model_sha256 TEXT NOT NULL,
            original_sha256 TEXT NOT NULL,
            audit TEXT NOT NULL,
            audit_sha256 TEXT NOT NULL,
            {_STAMP})""",
        f"""CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            request INTEGER NOT NULL REFERENCES requests (id),
            action TEXT NOT NULL,
            state TEXT NOT NULL
                CHECK (state IN ('open', 'served', 'verified', 'failed', 'withdrawn')),
            run INTEGER REFERENCES runs (id),
            verdict INTEGER REFERENCES verdicts (id),
            note TEXT,
            {_STAMP})""",
        "CREATE INDEX events_by_request ON events (request, id)",
        *(
            f"CREATE TRIGGER {table}_{verb.lower()} BEFORE {verb} ON {table}"
            f" BEGIN SELECT RAISE(ABORT, '{table} are never changed'); END"
            for table in ("events", "verdicts", "rows")
            for verb in ("UPDATE", "DELETE")
        ),
    ),
    (
        "ALTER TABLE requests ADD COLUMN columns TEXT",
        "ALTER TABLE requests ADD COLUMN joiner TEXT NOT NULL DEFAULT ' '",
    ),
)


def version_of(connection: sqlite3.Connection) -> int:
    """How many steps the file has taken; 0 for one without tables."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection) -> None:
    """Takes the steps that are missing, inside the transaction that is open."""
    for step in MIGRATIONS[version_of(connection) :]:
        for statement in step:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
