"""What `expunge evaluate --records` wrote of each row: its score, and its answer where that was kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.rows import RowSet, listed
from expunge.errors import InputError


@dataclass(frozen=True, repr=False)
class Record:
    """One model's score of one row."""

    score: float
    """In [0, 1]: ROUGE-L recall of a continuation, exact match of an answer."""
    generated: str | None
    """The answer, where the records were written with --reveal."""


def read_records(source: str, rows: Mapping[str, RowSet]) -> dict[tuple[str, str], Record]:
    """Records by (split, id) of the rows that are shown.

    Raises InputError, which never quotes the file, for what is no record and for records of other rows.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"--records {path}: no such file; write it with expunge evaluate --records")
    known = {split: {row.id: row for row in each} for split, each in rows.items()}
    found: dict[tuple[str, str], Record] = {}
    strange = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--records {path}: is not UTF-8; write it anew") from None
    for number, line in enumerate(lines, 1):
        split, name, record = _record(line, f"--records {path} line {number}")
        if split not in known:
            continue  # of a side that is not shown
        if name not in known[split]:
            strange.append(name)
        found[split, name] = record
    if strange:
        raise InputError(
            f"--records {path}: {len(strange)} ids are not among the rows (ids {listed(strange)});"
            " give the records of the same rows"
        )
    missing = [name for split, ids in known.items() for name in ids if (split, name) not in found]
    if missing:
        raise InputError(
            f"--records {path}: {len(missing)} rows have no record (ids {listed(missing)});"
            " give the records of the same rows"
        )
    return found


def _record(line: str, place: str) -> tuple[str, str, Record]:
    try:
        values: Any = json.loads(line)
        split, name, score = values["split"], values["id"], values["score"]
        generated = values.get("generated")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{place}: is no record; write it with expunge evaluate") from None
    right = isinstance(split, str) and isinstance(name, str)
    if not right or isinstance(score, bool) or not isinstance(score, int | float):
        raise InputError(f"{place}: is no record; write it with expunge evaluate")
    if not 0 <= score <= 1 or not isinstance(generated, str | None):
        raise InputError(f"{place}: its score is not from 0 to 1, or its answer no text; write it anew")
    return split, name, Record(float(score), generated)
