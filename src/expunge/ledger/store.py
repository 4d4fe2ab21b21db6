"""The ledger's file: opened, created, changed in transactions, and what is said where that fails.

SQLite with a write-ahead log: any number of processes may read and write at once, a change is there
as a whole or not at all, and a process that is killed leaves what was committed.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import expunge
from expunge.data.fingerprints import SECRET_BYTES, make_secret, secret_check
from expunge.disk import check_writable
from expunge.errors import InputError, RunError
from expunge.ledger.dates import now
from expunge.ledger.schema import APPLICATION_ID, MIGRATIONS, is_whole, migrate, version_of

PATIENCE = 30.0
"""Seconds that a change waits for another process to finish its own."""
SECRET_SUFFIX = ".secret"
_HEADER = b"SQLite format 3\0"


@dataclass(frozen=True)
class LedgerPlace:
    """Which ledger, and who writes in it."""

    ledger: str
    """The ledger's file."""
    secret: str | None = None
    """File with the ledger's secret; null: FILE.secret beside the ledger."""
    by: str | None = None
    """Who writes; null: this user at this machine."""

    @property
    def path(self) -> Path:
        """The ledger's file."""
        return Path(self.ledger)

    @property
    def secret_path(self) -> Path:
        """The file with its secret."""
        if self.secret is not None:
            return Path(self.secret)
        return self.path.with_name(self.path.name + SECRET_SUFFIX)

    @property
    def actor(self) -> str:
        """Who is recorded as the writer."""
        if self.by:
            return self.by
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container may know no name for it
            user = str(os.getuid())
        return f"{user}@{socket.gethostname()}"


class Ledger:
    """An open ledger."""

    def __init__(self, connection: sqlite3.Connection, place: LedgerPlace) -> None:
        self.connection, self.place = connection, place

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the right to write from its beginning; undone where it fails."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the ledger for several questions."""
        self.connection.execute("BEGIN")
        try:
            yield self.connection
        finally:
            self.connection.execute("ROLLBACK")

    def insert(self, table: str, **values: Any) -> int:
        """Adds a record and who adds it, inside the transaction that is open; returns its number."""
        values |= {"at": now(), "actor": self.place.actor, "version": expunge.__version__}
        names, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
        added = self.connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", values)
        assert added.lastrowid is not None
        return added.lastrowid

    def secret(self) -> bytes:
        """The key of the fingerprints. Raises InputError where it is missing or another ledger's."""
        found = _read_secret(self.place)
        expected = self.connection.execute("SELECT secret_check FROM identity").fetchone()[0]
        if secret_check(found) != expected:
            raise InputError(
                f"{self.place.secret_path}: is not the secret of {self.place.path}; give the right"
                " one with --secret"
            )
        return found


@contextmanager
def open_ledger(place: LedgerPlace, *, create: bool = False) -> Iterator[Ledger]:
    """Opens the ledger, brings an older one up to date, and closes it.

    With `create` a missing one is made. Raises InputError for what is no ledger or one of a newer
    version, RunError where the disk or another process stands in the way.
    """
    path = place.path
    _check_file(path, create=create)
    with plain_errors(path):
        if create and not path.exists():
            _check_new_secret(place)
            # Nobody but the owner; SQLite gives its log the same mode.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        uri = f"{path.absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)
        try:
            try:
                _prepare(connection, place)
            except UnicodeDecodeError:  # of SQLite's own message, which quotes what it found
                raise _damaged(path) from None
            yield Ledger(connection, place)
        finally:
            connection.close()


@contextmanager
def serving_lock(place: LedgerPlace) -> Iterator[None]:
    """Held by the one process that serves a ledger's requests; a killed one lets it go."""
    _read_secret(place)
    # On the secret: a file of its own would stay behind, and SQLite locks the ledger by itself.
    with place.secret_path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--ledger {place.path}: another process is serving its requests; wait for it"
            ) from None
        yield


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Says what SQLite and the disk say in one line with the mend."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explained(path, getattr(error, "sqlite_errorname", None) or "") from None
    except PermissionError as error:
        raise InputError(
            f"{error.filename or path}: may not be opened; change its permissions"
        ) from None


def _explained(path: Path, name: str) -> InputError | RunError:
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return RunError(
            f"{path}: another process has held it for {PATIENCE:g} s; nothing was changed, try again"
        )
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return RunError(
            f"{path}: cannot be written, the disk is full or faulty ({name}); nothing was changed,"
            " make room and try again"
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return InputError(
            f"--ledger {path}: the file or its directory cannot be written to; change the"
            " permissions (SQLite writes a log beside it even to read)"
        )
    # Python gives no name where text is not UTF-8, SQLite this one where a table is missing.
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or name in ("", "SQLITE_ERROR"):
        return _damaged(path)
    # Its message may quote what was to be written.
    return RunError(f"{path}: SQLite refuses ({name}); nothing was changed")


def _damaged(path: Path) -> InputError:
    return InputError(f"--ledger {path}: is damaged; put a backup in its place")


def _check_file(path: Path, *, create: bool) -> None:
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a device or a socket"
        raise InputError(f"--ledger {path}: is {kind}; name a file")
    if not path.exists():
        if not create:
            raise InputError(f"--ledger {path}: no such file; expunge requests add makes a ledger")
        if not path.absolute().parent.is_dir():
            raise InputError(f"--ledger {path}: its directory does not exist; make it first")
        check_writable(path, option="--ledger")
        return
    try:
        with path.open("rb") as file:
            header = file.read(len(_HEADER))
    except PermissionError:
        raise InputError(f"--ledger {path}: cannot be read; change its permissions") from None
    # An empty file is what a process leaves that was killed as it made the ledger.
    if header != _HEADER and not (create and header == b""):
        raise InputError(f"--ledger {path}: is no ledger; name another file")


def _prepare(connection: sqlite3.Connection, place: LedgerPlace) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    ledger = Ledger(connection, place)
    with ledger.reading():  # one state: another process may be making the ledger meanwhile
        version, owner, tables = version_of(connection), _owner(connection), _has_tables(connection)
    if owner != APPLICATION_ID and (version or owner or tables):
        raise InputError(f"--ledger {place.path}: is a database of something else; name another file")
    if version > len(MIGRATIONS):
        raise InputError(
            f"--ledger {place.path}: was written by a newer expunge (schema {version}, this one"
            f" knows {len(MIGRATIONS)}); update expunge"
        )
    if version < len(MIGRATIONS):
        _write_ahead(connection)
        with ledger.change():
            # Another process may have been first while this one waited.
            if version_of(connection) < len(MIGRATIONS):
                migrate(connection)
                _identify(ledger)
    connection.execute("PRAGMA synchronous = FULL")
    if not is_whole(connection):
        raise _damaged(place.path)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turns the log on; SQLite does not wait by itself where another process is doing the same."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _identify(ledger: Ledger) -> None:
    """Ties the new ledger to its secret, which is made where there is none yet."""
    place = ledger.place
    if ledger.connection.execute("SELECT count(*) FROM identity").fetchone()[0]:
        return
    path = place.secret_path
    if not path.exists():
        make_secret(path)
    ledger.insert("identity", only_one=1, secret_check=secret_check(_read_secret(place)))


def _check_new_secret(place: LedgerPlace) -> None:
    """Raises InputError for a secret that a new ledger could not have, before it is made."""
    path = place.secret_path
    if path.exists():
        _read_secret(place)
    elif not path.absolute().parent.is_dir():
        raise InputError(f"--secret {path}: its directory does not exist; make it first")


def _read_secret(place: LedgerPlace) -> bytes:
    path = place.secret_path
    try:
        found = bytes.fromhex(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file, and rows cannot be compared without the ledger's secret; put it"
            " back from a backup or give it with --secret"
        ) from None
    except (ValueError, IsADirectoryError, NotADirectoryError):
        found = b""
    if len(found) != SECRET_BYTES:
        raise InputError(
            f"{path}: is no ledger's secret ({2 * SECRET_BYTES} hexadecimal digits); name the file"
            " with --secret"
        )
    return found


def _owner(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA application_id").fetchone()[0])


def _has_tables(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])
