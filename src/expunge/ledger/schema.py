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


_FAULTS = (
    "PRAGMA foreign_key_check",
    "SELECT 1 WHERE (SELECT count(*) FROM identity) <> 1",
    "SELECT 1 FROM requests WHERE id NOT IN (SELECT request FROM events)",
    "SELECT 1 FROM requests WHERE date(received, '0 days') IS NOT received"
    " OR date(due, '0 days') IS NOT due",
    "SELECT 1 FROM runs WHERE json_type(retain) <> 'array' OR json_type(model_before) <> 'object'"
    " OR json_type(model_after) <> 'object'",
    "SELECT 1 FROM verdicts WHERE json_type(model_sha256) <> 'object'"
    " OR json_type(original_sha256) <> 'object'",
)
"""What finds nothing in a ledger that expunge alone has written."""


def is_whole(connection: sqlite3.Connection) -> bool:
    """Whether tables, types and records are as expunge writes them. Raises sqlite3.Error too."""
    new = sqlite3.connect(":memory:", isolation_level=None)
    migrate(new)
    tables = "SELECT type, name, sql FROM sqlite_schema ORDER BY name"
    if connection.execute(tables).fetchall() != new.execute(tables).fetchall():
        return False
    columns = new.execute(
        "SELECT m.name, p.name, p.type FROM sqlite_schema m, pragma_table_info(m.name) p"
        " WHERE m.type = 'table'"
    ).fetchall()
    new.close()
    types = [
        f"SELECT 1 FROM {table} WHERE typeof({column}) NOT IN (lower('{kind}'), 'null')"
        for table, column, kind in columns
        if kind
    ]
    whole = connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
    return whole and not any(connection.execute(each).fetchone() for each in (*_FAULTS, *types))
