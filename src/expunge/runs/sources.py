"""Where the sources of a run lie, for the commands that come after it.

A run directory leaves the machine, so its record names sources by their last part and keyed hashes.
Their paths stand apart from it, for this user alone, in runs/<SHA-256 of expunge.json>.json beside the
secret of those hashes: the directory may be moved, and a copy of it elsewhere tells nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from expunge.data.fingerprints import (
    PLACE,
    lasting,
    secret_file,
    source_fingerprint,
    users_secret,
)
from expunge.data.formats import sha256_of
from expunge.disk import check_writable, write_whole
from expunge.errors import InputError
from expunge.models.files import MANIFEST, read_json

_MODELS = ("original", "oracle", "base")
_RECORDED = {
    "columns": ("settings", "inputs"),
    "joiner": ("settings", "inputs"),
    "long_rows": ("settings", "training", "text"),
}
"""Where the run's own record holds an option."""
_WITH_FORGET = {
    "retain", "nonmembers", "paraphrases", "mmlu", "columns", "joiner", "long_rows",
}  # fmt: skip
"""What goes with the recorded forget set, and not with another that is given in its place."""


def sources_of(paths: Mapping[str, str | None]) -> dict[str, dict[str, str]]:
    """By option that names a source its lasting path, and its hash under the user's secret."""
    return {
        name: {"path": lasting(path), "hmac_sha256": _fingerprint(name, path)}
        for name, path in paths.items()
        if path is not None
    }


def check_place() -> None:
    """Raises InputError where nothing can be remembered."""
    users_secret()
    check_writable(_directory(), inside=True, option=PLACE)


def remember(output: Path, said: Mapping[str, Any]) -> None:
    """Adds to what is remembered of a finished run. Raises OSError where nothing can be written."""
    path = _place(output)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_whole(path, json.dumps({**remembered(output), **said}, indent=2) + "\n", private=True)


def remembered(output: Path) -> dict[str, Any]:
    """What is remembered of a run directory; nothing of another user's or machine's."""
    if not (output / MANIFEST).is_file() or not secret_file().is_file():
        return {}
    path = _place(output)
    return read_json(path) if path.is_file() else {}


def recalled(output: Path, wanted: Collection[str]) -> dict[str, Any]:
    """Values of those of the `wanted` options that a run directory knows; of no run none.

    Raises InputError for a source that is gone or changed.
    """
    wanted = set(wanted) - (_WITH_FORGET if "forget" not in wanted else set())
    kept = remembered(output)
    known = {"subject": kept.get("subject")}
    if wanted & set(_RECORDED) and (output / MANIFEST).is_file():
        settings = read_json(output / MANIFEST)
        known |= {name: _entry(settings, *_RECORDED[name], name) for name in _RECORDED}
    for name in wanted:
        source = kept.get("sources", {}).get(name)
        if source is None:
            continue
        path = source["path"]
        if _fingerprint(name, path) != source["hmac_sha256"]:
            there = "is no more" if not Path(path).exists() else "is not as it was"
            raise InputError(
                f"--{name}: {path} {there} since {output} was made of it; give --{name} anew"
            )
        known[name] = path
    return {name: value for name, value in known.items() if name in wanted and value is not None}


def _entry(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _directory() -> Path:
    return secret_file().parent / "runs"


def _place(output: Path) -> Path:
    return _directory() / f"{sha256_of(output / MANIFEST)}.json"


def _fingerprint(name: str, source: str) -> str:
    """Of a file, a model's weights or a directory's files; a hub id stands for itself."""
    place = Path(source)
    if not place.exists():
        return source
    files = [place]
    if place.is_dir():
        # A report writes the card of a model anew, which is the same model.
        kind = "*.safetensors" if name in _MODELS else "*"
        files = [path for path in sorted(place.rglob(kind)) if path.is_file()]
    return source_fingerprint(users_secret(), {str(path): sha256_of(path) for path in files})
