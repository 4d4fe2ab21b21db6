"""Ed25519 signatures (RFC 8032) through the library `cryptography`, the extra `signing`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.errors import InputError, install

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

MAKE_KEY = "openssl genpkey -algorithm ed25519 -out private.pem"


def check_installed(option: str) -> None:
    """Raises InputError with the install command where the library is missing."""
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(
            f"{option}: needs the library cryptography, which is not installed; {install('signing')}"
        ) from None


def read_private_key(path: str) -> Ed25519PrivateKey:
    """Reads an unencrypted PEM file. Raises InputError for anything else."""
    check_installed("--key")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _bytes("--key", path)
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise InputError(
            f"--key {path}: is encrypted; give it decrypted, from a place that only you can read"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"--key {path}: is no Ed25519 private key in PEM; make one: {MAKE_KEY}")
    return key


def read_public_key(name: str, pem: bytes) -> Ed25519PublicKey:
    """Reads PEM. Raises InputError that begins with `name`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(
            f"{name}: is no Ed25519 public key in PEM; take it from the private one: openssl pkey -in"
            " private.pem -pubout"
        )
    return key


def public_key_file(path: str) -> Ed25519PublicKey:
    """Reads a PEM file. Raises InputError."""
    check_installed("--public-key")
    return read_public_key(f"--public-key {path}", _bytes("--public-key", path))


def public_pem(key: Ed25519PublicKey) -> bytes:
    """The key in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def key_name(key: Ed25519PublicKey) -> str:
    """SHA-256 of the 32 raw bytes: how people compare keys."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def is_signed_by(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    """Whether the signature is the key's."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _bytes(option: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}; name a PEM file") from None
