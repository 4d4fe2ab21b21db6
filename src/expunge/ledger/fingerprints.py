"""Keyed hashes: HMAC-SHA-256 of rows and of files under the ledger's secret.

A plain hash of a short text, such as a sentence with a telephone number, is found by trying all
numbers. Under a key that lies elsewhere it is not. The key is one for the whole ledger, so that equal
rows of two requests are found.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from expunge.data.rows import Row, normalised

SECRET_BYTES = 32


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
