"""scores.json and the records of a measurement, as files hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from expunge.data.fingerprints import named
from expunge.errors import InputError
from expunge.evaluation.protocols.base import SEMEVAL, Measure, ProtocolScores
from expunge.evaluation.scorecard import Scorecard

Card = TypeVar("Card", Scorecard, ProtocolScores)

SCORES = "scores.json"
"""Its name in a run directory."""


def scores_text(card: Scorecard | ProtocolScores, model: str, sha256: Mapping[str, str]) -> str:
    """What scores.json holds; `sha256` is of the files with the weights that were measured."""
    measured = {"model": named(model), "model_sha256": dict(sha256)}
    return json.dumps({**measured, **card.to_json()}, indent=2) + "\n"


def is_scores(text: str) -> bool:
    """Whether a file holds a scorecard. Raises what is no JSON of its form."""
    values = json.loads(text)
    if protocol_in(values) == SEMEVAL:
        Scorecard.from_json(values)
        return True
    return {"scores", "rows", "details"} <= set(values)


def protocol_in(values: Mapping[str, Any]) -> str:
    """The protocol that a score file's content is of."""
    return str(values.get("protocol", SEMEVAL))


def opened(source: str) -> tuple[Path, Mapping[str, Any]]:
    """The path and the content of a scores.json, or of that of a directory, of whatever protocol.

    Raises InputError that names the file.
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
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise _no_scores(path)
    return path, values


def read_scores(source: str) -> Scorecard:
    """Reads a scores.json of the scorecard, or that of a directory.

    Raises InputError that names the file, and the cell where one holds no score.
    """
    return _read(source, SEMEVAL, Scorecard.from_json)


def read_protocol_scores(source: str, protocol: str, measures: Mapping[str, Measure]) -> ProtocolScores:
    """The same of another protocol, whose `measures` these are."""
    return _read(source, protocol, lambda values: ProtocolScores.from_json(values, measures))


def _read(source: str, protocol: str, made: Callable[[Mapping[str, Any]], Card]) -> Card:
    path, values = opened(source)
    if (found := protocol_in(values)) != protocol:
        raise InputError(
            f"{path}: was measured by the protocol {found}, not {protocol}; measure it again with"
            f" expunge evaluate --protocol {protocol}"
        )
    try:
        return made(values)
    except InputError as error:
        raise InputError(f"{path}: {error}; make it anew with expunge evaluate") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _no_scores(path) from None


def _no_scores(path: Path) -> InputError:
    return InputError(f"{path}: is not a scores.json; make it with expunge evaluate")


def check_one_form(cards: Mapping[str, Scorecard] | Mapping[str, ProtocolScores]) -> None:
    """Raises InputError where some were measured with the chat template and others without.

    Nor may a task of lm-evaluation-harness have other rows, solved examples or another version, the
    library another one, or the same tasks another number of texts that lost their start.
    """
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
    _check_one_harness(
        {name: card for name, card in cards.items() if isinstance(card, Scorecard) and card.harness}
    )


def _check_one_harness(cards: Mapping[str, Scorecard]) -> None:
    first: dict[str, tuple[str, list[Any]]] = {}
    for name, card in cards.items():
        shared = card.details.get("harness")
        shared = shared if isinstance(shared, Mapping) else {}
        forms = {
            f"task {task} has other rows, shots, version or lm-eval": [
                shared.get("version"), *map(entry.get, ("rows", "shots", "version")),
            ]
            for task, entry in card.harness.items()
        }  # fmt: skip
        forms[f"{', '.join(card.harness)} lost the start of more or fewer texts"] = [shared.get("cut")]
        for what, form in forms.items():
            other, its_form = first.setdefault(what, (name, form))
            if form != its_form:
                raise InputError(
                    f"{name}: its harness {what} than {other}'s; measure both again with the same"
                    " expunge evaluate --harness and the same lm-eval"
                )


def records_text(card: Scorecard | ProtocolScores, *, reveal: bool) -> str:
    """One JSON line a row, with what was generated only to reveal it."""
    shown = ({k: v for k, v in r.items() if reveal or k != "generated"} for r in card.records)
    return "".join(json.dumps(record) + "\n" for record in shown)


def is_records(text: str) -> bool:
    """Whether a file holds such lines. Raises what is no JSON of their form."""
    return {"id", "split", "score"} <= set(json.loads(text.partition("\n")[0]))
