"""How files that may be handed out name data: base names, and hashes keyed with a secret.

A plain hash of a short text, such as a sentence with a telephone number, is found by trying all
numbers. Under a key that lies elsewhere it is not (HMAC-SHA-256). A ledger has a secret of its own, one
for all of its requests; runs, audits and analyses take that of the user.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from expunge.data.rows import Row, RowSet, normalised
from expunge.disk import explained, write_whole
from expunge.errors import InputError

SECRET_BYTES = 32
PLACE = "EXPUNGE_SECRET"
"""The environment variable that names the file with the user's secret."""
_PATHS = (
    "model", "base", "forget", "retain", "nonmembers", "score_nonmembers", "mmlu", "influence", "output",
    "audit", "source",
)  # fmt: skip


def named(source: str) -> str:
    """A path by its last part alone, a hub id as it is."""
    place = Path(source).absolute()
    is_path = Path(source).is_absolute() or place.exists()
    return Path(os.path.normpath(place)).name if is_path else source


def lasting(source: str) -> str:
    """A path that means the same from everywhere; a hub id as it is."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def handed_out(values: Any) -> Any:
    """The same with every path, at whatever depth, by its last part alone."""
    if isinstance(values, Mapping):
        return {
            key: named(value)
            if key in _PATHS and value and isinstance(value, str)
            else handed_out(value)
            for key, value in values.items()
        }
    return [handed_out(each) for each in values] if isinstance(values, list | tuple) else values


def data_fingerprint(rows: RowSet) -> str:
    """Of a set's files, keyed with the user's secret; its first part tells which secret that is.

    Raises InputError where there is no secret and none can be made.
    """
    secret = users_secret()
    return f"{secret_check(secret)[:8]}:{source_fingerprint(secret, rows.sha256)}"


def same_data(one: str, other: str) -> bool | None:
    """Whether two fingerprints are of the same files; None where their secrets differ."""
    same_secret = one.partition(":")[0] == other.partition(":")[0]
    return one == other if same_secret else None


def secret_file() -> Path:
    """The file that EXPUNGE_SECRET names, or ~/.config/expunge/secret. Raises InputError."""
    if given := os.environ.get(PLACE):
        return Path(given)
    try:
        settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
    except RuntimeError:
        raise InputError(f"this user has no home for a secret; name a file with {PLACE}") from None
    return settings / "expunge" / "secret"


def users_secret() -> bytes:
    """The content of `secret_file`, which is made where there is none. Raises InputError."""
    path = secret_file()
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_secret(path)
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise InputError(
            f"{explained(error)}; a secret keeps hashes of data from being guessed: name a file for it"
            f" with {PLACE}"
        ) from None
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise InputError(f"{path}: is no secret; delete it, or name another file with {PLACE}")
    return secret


def make_secret(path: Path) -> None:
    """Makes the file, for its owner alone; of several the first one stays. Raises OSError."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_whole(part, secrets.token_hex(SECRET_BYTES) + "\n", private=True)
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    finally:
        part.unlink()


def row_fingerprint(secret: bytes, row: Row) -> str:
    """Of a row's whole text, spaces evened as `check_disjoint` does; 64 hexadecimal digits."""
    return _mac(secret, "row", [normalised(row)])


def source_fingerprint(secret: bytes, sha256: Mapping[str, str]) -> str:
    """Of a set's files, by the SHA-256 of each; names and order do not count, so it may move."""
    return _mac(secret, "source", sorted(sha256.values()))


def rows_fingerprint(secret: bytes, fingerprints: Iterable[str]) -> str:
    """Of a joined set, by the fingerprints of its rows in their order."""
    return _mac(secret, "rows", fingerprints)


def secret_check(secret: bytes) -> str:
    """What tells, in the ledger, whether a secret is the ledger's."""
    return _mac(secret, "ledger", [])


def _mac(secret: bytes, purpose: str, parts: Iterable[str]) -> str:
    # The purpose is part of what is hashed: a row's fingerprint never equals a file's.
    message = "\0".join([purpose, *parts])
    return hmac.new(secret, message.encode(), hashlib.sha256).hexdigest()
