"""scores.json and the records of a measurement, as files hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from expunge.data.fingerprints import named
from expunge.errors import InputError
from expunge.evaluation.scorecard import Scorecard

SCORES = "scores.json"
"""Its name in a run directory."""


def scores_text(card: Scorecard, model: str, sha256: Mapping[str, str]) -> str:
    """What scores.json holds; `sha256` is of the files with the weights that were measured."""
    measured = {"model": named(model), "model_sha256": dict(sha256)}
    return json.dumps({**measured, **card.to_json()}, indent=2) + "\n"


def is_scores(text: str) -> bool:
    """Whether a file holds a scorecard. Raises what is no JSON of its form."""
    Scorecard.from_json(json.loads(text))
    return True


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


def check_one_form(cards: Mapping[str, Scorecard]) -> None:
    """Raises InputError where some were measured with the chat template and others without."""
    forms = {name: card.details.get("text") for name, card in cards.items()}
    told = {
        name: text["chat_template"]
        for name, text in forms.items()
        if isinstance(text, Mapping) and isinstance(text.get("chat_template"), bool)
    }
    if len(set(told.values())) > 1:
        on, off = (next(n for n, used in told.items() if used is state) for state in (True, False))
        raise InputError(
            f"{on}: was measured with the chat template, {off} without; measure both again with the same"
            " expunge evaluate --chat-template on or off"
        )


def records_text(card: Scorecard, *, reveal: bool) -> str:
    """One JSON line a row, with what was generated only to reveal it."""
    shown = ({k: v for k, v in r.items() if reveal or k != "generated"} for r in card.records)
    return "".join(json.dumps(record) + "\n" for record in shown)


def is_records(text: str) -> bool:
    """Whether a file holds such lines. Raises what is no JSON of their form."""
    return {"id", "split", "score"} <= set(json.loads(text.partition("\n")[0]))
