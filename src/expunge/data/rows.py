"""Rows of a forget, retain or non-member set, checked as they are read.

A row is `input` and `output` (and optionally `id`, `task`, `kind`), or one `text` column. Its whole
text is always `input + " " + output`, the convention of SemEval-2025 Task 4.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from expunge.data.formats import Record, Role, open_source
from expunge.data.words import same_form
from expunge.errors import InputError

Kind = Literal["sc", "qa"]
"""`sc`: the output continues the input (regurgitation); `qa`: it answers it (knowledge)."""

DEFAULT_TASK = "default"
_COLUMNS = (
    "id", "input", "output", "task", "kind", "text", "prompt", "completion", "question", "answer",
    "instruction", "response",
)  # fmt: skip
"""Ours, and those that other data sets use for the same."""
_LISTED_IDS = 10
_LUME_ID = re.compile(r"^(?P<document>.*?)(?P<kind>sc|qa)\d+$")


@dataclass(frozen=True, slots=True, repr=False)
class Row:
    """One document continuation or question; its repr names the id and never shows the text."""

    id: str
    input: str
    output: str
    task: str = DEFAULT_TASK
    kind: Kind = "sc"

    @property
    def text(self) -> str:
        """The whole document, as a model was trained on it."""
        return f"{self.input} {self.output}"

    def __repr__(self) -> str:
        return f"Row(id={self.id!r}, task={self.task!r}, kind={self.kind!r})"


@dataclass(frozen=True, repr=False)
class RowSet:
    """The rows of one set, with what the manifest records of where they came from."""

    rows: tuple[Row, ...]
    source: str
    sha256: Mapping[str, str]
    """SHA-256 by file, or of the rows themselves where there is no file."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"RowSet({len(self.rows)} rows of {self.source!r})"


def read_rows(source: str, role: Role) -> RowSet:
    """Reads and checks every row of `source`: a file, a directory or a hub data set id.

    Raises InputError that names the file and row of the first fault and counts the others.
    """
    opened = open_source(source, role)
    rows = _checked(opened.name, opened.records, role)
    return RowSet(rows, source, opened.sha256 or {source: _digest(rows)})


def as_rows(rows: Iterable[Row | Mapping[str, object]], role: Role) -> RowSet:
    """The same checks for rows that are already in memory."""
    if isinstance(rows, RowSet):
        return rows
    name = f"{role} rows"
    plain = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Row | Mapping):
            raise InputError(
                f"{name} row {number}: is a {type(row).__name__}; give mappings with 'input' and"
                " 'output'"
            )
        plain.append(asdict(row) if isinstance(row, Row) else row)
    checked = _checked(name, [Record(f"row {n}", row) for n, row in enumerate(plain, 1)], role)
    return RowSet(checked, name, {name: _digest(checked)})


def check_disjoint(first: RowSet, second: RowSet) -> None:
    """Raises InputError that lists the ids of rows whose text, or id, is on both sides."""
    ids = {row.id for row in second}
    texts = {normalised(row) for row in second}
    shared = [row.id for row in first if normalised(row) in texts]
    if len(shared) == len(first) == len(second):
        raise InputError(
            f"{first.source} and {second.source}: hold the same rows; give two different sets"
        )
    if shared:
        raise InputError(
            f"{first.source}: {len(shared)} rows are in {second.source} as well"
            f" (ids {listed(shared)}); remove them from one side"
        )
    named = [row.id for row in first if row.id in ids]
    if named:
        raise InputError(
            f"{first.source}: {len(named)} ids stand for other rows in {second.source}"
            f" (ids {listed(named)}); give every row an id of its own, or leave the column out"
        )


def document_of(row: Row | str) -> str:
    """The document, or person, that a row, or one of this id, is about: rows of one belong together.

    LUME's ids name it before `sc` or `qa`; a row with another id is a document of its own.
    """
    name = row if isinstance(row, str) else row.id
    match = _LUME_ID.match(name)
    return (match and match["document"]) or name


def by_document(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each document, in the order of the rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(document_of(row), []).append(row)
    return found


def documents(rows: Iterable[Row]) -> list[Row]:
    """What membership inference scores: the continuation rows, or all where there is none."""
    rows = list(rows)
    return [row for row in rows if row.kind == "sc"] or rows


def _checked(name: str, records: Sequence[Record], role: Role) -> tuple[Row, ...]:
    rows: list[Row] = []
    faults: list[str] = []
    places: dict[str, str] = {}
    for position, record in enumerate(records, 1):
        try:
            row = _row_of(record.values, fallback_id=f"{role}-{position}")
        except InputError as fault:
            faults.append(f"{record.place}: {fault}")
            continue
        if row.id in places:
            faults.append(
                f"{record.place}: id {row.id!r} was used before, at {places[row.id]};"
                " give every row an id of its own"
            )
        places.setdefault(row.id, record.place)
        rows.append(row)
    if faults:
        more = f" (and {len(faults) - 1} more faulty rows)" if len(faults) > 1 else ""
        raise InputError(f"{name} {faults[0]}{more}")
    if not rows:
        raise InputError(f"{name}: holds no rows; give at least one")
    return tuple(rows)


def _row_of(values: Mapping[str, object], fallback_id: str) -> Row:
    if "input" not in values and "output" not in values and "text" in values:
        prompt, output = _halves(_text(values, "text"))
    else:
        prompt, output = _text(values, "input"), _text(values, "output")
    row_id = values.get("id")
    if row_id is None or row_id == "":
        row_id = fallback_id
    elif isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise InputError(f"column 'id' holds a {_type_name(row_id)}; use text or a whole number")
    task = values.get("task")
    if task is None or task == "":
        task = DEFAULT_TASK
    elif not isinstance(task, str):
        raise InputError(f"column 'task' holds a {_type_name(task)}; use text")
    _check_characters("id", str(row_id))
    _check_characters("task", task)
    return Row(str(row_id), prompt, output, task, _kind(values.get("kind"), str(row_id), prompt))


def _text(values: Mapping[str, object], column: str) -> str:
    if column not in values:
        # Any other name may be text of a row, so it is counted, not shown.
        known = [repr(name) for name in _COLUMNS if name in values]
        others = len(values) - len(known)
        found = ", ".join([*known, *([f"{others} others"] if others else [])]) or "none"
        raise InputError(
            f"has no column {column!r} (found: {found}); rows need 'input' and 'output', or 'text'"
        )
    value = values[column]
    if not isinstance(value, str):
        raise InputError(f"column {column!r} holds a {_type_name(value)}; use text")
    _check_characters(column, value)
    if not value.strip():
        raise InputError(f"column {column!r} is empty; fill it or drop the row")
    return value


def _check_characters(column: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"column {column!r} holds half a character (a lone surrogate)") from None


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _halves(text: str) -> tuple[str, str]:
    """Splits a plain text at the space nearest its middle, so that the second half continues it."""
    stripped = text.strip()
    spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", stripped)]
    if not spaces:
        raise InputError("column 'text' is a single word; a text is split in two to be continued")
    middle = min(spaces, key=lambda place: abs(place - len(stripped) / 2))
    return stripped[:middle], stripped[middle + 1 :]


def _kind(given: object, row_id: str, prompt: str) -> Kind:
    """An explicit `kind` column first, then LUME's ids, then a question mark at the input's end."""
    if given == "sc" or given == "qa":
        return given
    if given is not None and given != "":
        raise InputError(f"column 'kind' is not one of {', '.join(get_args(Kind))}")
    if match := _LUME_ID.match(row_id):
        return "qa" if match["kind"] == "qa" else "sc"
    return "qa" if prompt.rstrip().endswith("?") else "sc"


def normalised(row: Row) -> str:
    """The whole text with every space as one, in one Unicode form: what makes two rows the same."""
    return " ".join(same_form(row.text).split())


def listed(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - _LISTED_IDS} more" if len(ids) > _LISTED_IDS else ""
    return ", ".join(ids[:_LISTED_IDS]) + more


def _digest(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for value in (row.id, row.input, row.output, row.task, row.kind):
            digest.update(value.encode() + b"\0")
    return digest.hexdigest()
