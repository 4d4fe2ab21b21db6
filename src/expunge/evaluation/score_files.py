"""scores.json and the records of a measurement, as they lie on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from expunge.errors import InputError
from expunge.evaluation.scorecard import Scorecard

SCORES = "scores.json"
"""Its name in a run directory."""


def write_scores(card: Scorecard, path: Path, model: str, sha256: Mapping[str, str]) -> None:
    """Writes scores.json; `sha256` is of the files with the weights that were measured."""
    named = {"model": model, "model_sha256": dict(sha256)}
    text = json.dumps({**named, **card.to_json()}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def read_scores(source: str) -> Scorecard:
    """Reads a scores.json, or that of a directory.

    Raises InputError that names the file, and the cell where one holds no score.
    """
    path = Path(source)
    if path.is_dir():
        path = path / SCORES
    if not path.is_file():
        made = "MODEL" if path.suffix == ".json" and path == Path(source) else source
        raise InputError(
            f"{path}: not found; make it with expunge evaluate {made} --forget F --output {path}"
        )
    try:
        return Scorecard.from_json(json.loads(path.read_text(encoding="utf-8")))
    except InputError as error:
        raise InputError(f"{path}: {error}; make it anew with expunge evaluate") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: is not a scores.json; make it with expunge evaluate") from None


def write_records(card: Scorecard, path: Path, *, reveal: bool) -> None:
    """Writes one JSON line a row, with what was generated only to reveal it."""
    with path.open("w", encoding="utf-8") as file:
        for record in card.records:
            shown = {k: v for k, v in record.items() if reveal or k != "generated"}
            file.write(json.dumps(shown) + "\n")
