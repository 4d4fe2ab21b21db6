"""Rows of a forget, retain or non-member set, checked as they are read.

A row is a prompt and its output (and an id, a task, a kind, a document). Its whole text is the prompt,
the joiner and the output; a blank joins them by the convention of SemEval-2025 Task 4.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from typing import Any, TypeVar

from expunge.data.authors import QUESTIONS, author_of, in_blocks_of_authors
from expunge.data.columns import (
    Form,
    Kind,
    Mapped,
    OtherColumns,
    Turns,
    check_characters,
    document_in,
    kind_of,
    mapped_columns,
    parts_of,
    text_in,
    type_name,
)
from expunge.data.formats import Record, Role, Source, open_source
from expunge.data.words import same_form
from expunge.errors import InputError

Inputs = TypeVar("Inputs")
DEFAULT_TASK = "default"
_LISTED_IDS = 10
_ALONE = "the row alone"
_LONGEST_NAME = 200
"""Characters of a document's name; it stands in reports, where no text of a row may."""


@dataclass(frozen=True, slots=True, repr=False)
class Row:
    """One document continuation or question; its repr names the id and never shows the text."""

    id: str
    input: str
    output: str
    task: str = DEFAULT_TASK
    kind: Kind = "sc"
    joiner: str = " "
    """What stands between input and output in the text that a model was trained on."""
    document: str = ""
    """The document, or person, that it is about, where a column says so."""
    turns: Turns = ()
    """What was said before `input`, in a chat of several turns."""

    @property
    def prompt(self) -> str:
        """All that stands before the output, without a chat template."""
        return "\n".join([*(content for _, content in self.turns), self.input])

    @property
    def text(self) -> str:
        """The whole document, as a model was trained on it."""
        return f"{self.prompt}{self.joiner}{self.output}"

    def __repr__(self) -> str:
        return f"Row(id={self.id!r}, task={self.task!r}, kind={self.kind!r})"


@dataclass(frozen=True, repr=False)
class RowSet:
    """The rows of one set, with what the manifest records of where they came from."""

    rows: tuple[Row, ...]
    source: str
    sha256: Mapping[str, str]
    """SHA-256 by file, or of the rows themselves where there is no file. Where the columns or the joiner
    were said, of that and the file's, so that other rows of one file are another set."""
    read: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """How many rows were read from which columns, and by what their kind and document were told."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"RowSet({len(self.rows)} rows of {self.source!r})"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the columns of row files become rows."""

    columns: str | None = None
    """Columns to read, such as text=body; null: those of known forms. Others:
    prompt=instruction+input,output=output; also id, task, kind and document. For one set alone:
    retain.prompt=question,retain.output=answer."""
    joiner: str = " "
    """What stands between input and output in the training text. \\n is a line break. Words in it, such
    as \\nAnswer:, belong to the prompt."""

    @staticmethod
    def recorded(values: Mapping[str, Any]) -> Reading:
        """As a manifest or a ledger says."""
        return Reading(columns=values.get("columns"), joiner=values.get("joiner", " "))

    def into(self, kind: type[Inputs], **others: Any) -> Inputs:
        """Inputs of another kind with the values of the fields that both have.

        `others` stand before those. A field of `kind` alone keeps its default: the tests list them.
        """
        names = {field.name for field in fields(self)}
        names &= {field.name for field in fields(kind)}  # type: ignore[arg-type]
        return kind(**{name: getattr(self, name) for name in names} | others)

    def read(
        self, source: str, role: Role, *, again: bool = False, opened: Source | None = None
    ) -> RowSet:
        """Reads and checks every row of `source`: a file, a directory or a hub data set id.

        `again` says that the columns are as they were recorded, and that no option can change them.
        `opened` is the source where the caller has read it.
        Raises InputError that names the file and row of the first fault and counts the others.
        """
        mapped = mapped_columns(self.columns, role)
        joiner = self.joiner.replace("\\n", "\n").replace("\\t", "\t")
        opened = opened or open_source(source, role)
        rows, read = _checked(opened.name, opened.records, role, mapped, joiner, plain=again)
        sha256 = opened.sha256 or {source: _digest(rows)}
        if (mapped or joiner != " ") and opened.sha256:
            said = repr((sorted(mapped.items()), joiner))
            sha256 = {
                name: hashlib.sha256(f"{digest} {said}".encode()).hexdigest()
                for name, digest in sha256.items()
            }
        return RowSet(rows, source, sha256, read)

    def read_sets(self, *names: str) -> dict[str, RowSet]:
        """Rows by the fields that name their sources; those of a field that names none are left out."""
        roles: dict[str, Role] = {"forget": "forget", "members": "forget", "retain": "retain"}
        sources = {name: getattr(self, name) for name in names}
        return {
            name: self.read(source, roles.get(name, "nonmembers"))
            for name, source in sources.items()
            if source
        }


def read_rows(source: str, role: Role) -> RowSet:
    """Reads rows of a known form, joined by a blank."""
    return Reading().read(source, role)


def as_rows(rows: Iterable[Row | Mapping[str, object]], role: Role) -> RowSet:
    """The same checks for rows that are already in memory."""
    if isinstance(rows, RowSet):
        return rows
    name = f"{role} rows"
    records = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Row | Mapping):
            raise InputError(
                f"{name} row {number}: is a {type(row).__name__}; give mappings with 'input' and"
                " 'output'"
            )
        values = {"row": row} if isinstance(row, Row) else row
        records.append(Record(f"row {number}", values))
    checked, read = _checked(name, records, role, {}, " ", plain=True)
    return RowSet(checked, name, {name: _digest(checked)}, read)


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


def document_of(row: Row) -> str:
    """The document, or person, that a row is about: rows of one belong together.

    The column `document` names it, else LUME's ids do, else the order of TOFU's rows; any other row is a
    document of its own.
    """
    return row.document or document_in(row.id) or row.id


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


def _checked(
    name: str, records: Sequence[Record], role: Role, mapped: Mapped, joiner: str, *, plain: bool
) -> tuple[tuple[Row, ...], dict[str, Mapping[str, int]]]:
    rows: list[Row] = []
    faults: list[str] = []
    places: dict[str, str] = {}
    read: dict[str, Counter[str]] = {"columns": Counter(), "kind": Counter(), "document": Counter()}
    for position, record in enumerate(records, 1):
        try:
            row, told = _row_of(record.values, f"{role}-{position}", mapped, joiner)
        except InputError as fault:
            said = fault.plain if plain and isinstance(fault, OtherColumns) else fault
            faults.append(f"{record.place}: {said}")
            continue
        if row.id in places:
            faults.append(
                f"{record.place}: id {row.id!r} was used before, at {places[row.id]};"
                " give every row an id of its own"
            )
        places.setdefault(row.id, record.place)
        rows.append(row)
        for about, what in zip(read, told, strict=True):
            read[about][what] += 1
    if faults:
        more = f" (and {len(faults) - 1} more faulty rows)" if len(faults) > 1 else ""
        raise InputError(f"{name} {faults[0]}{more}")
    if not rows:
        raise InputError(f"{name}: holds no rows; give at least one")
    alone = {"question, answer": len(rows)}, {_ALONE: len(rows)}
    if (read["columns"], read["document"]) == alone and in_blocks_of_authors([r.text for r in rows]):
        # Of a name that is in the text no part may stand in a report.
        rows = [
            replace(row, document=f"{role}-author-{author_of(position)}")
            for position, row in enumerate(rows)
        ]
        read["document"] = Counter({f"blocks of {QUESTIONS} rows with a name of their own": len(rows)})
    return tuple(rows), {about: dict(counts) for about, counts in read.items()}


def _row_of(
    values: Mapping[str, Any], fallback_id: str, mapped: Mapped, joiner: str
) -> tuple[Row, tuple[str, str, str]]:
    """A row, and what told its texts, its kind and its document."""
    if isinstance(row := values.get("row"), Row):  # one that the caller made
        for name in ("input", "output"):
            text_in(asdict(row), name)
        check_characters("id", row.id)
        kind_of(row.kind, Form(()), row.id, row.input)
        return row, ("a Row", "the Row", "the Row")
    parts = parts_of(values, mapped, joiner)
    said = {name: values.get(mapped.get(name, (name,))[0]) for name in ("id", "task", "kind")}
    row_id, task = _name(said["id"], "id") or fallback_id, said["task"]
    if task is None or task == "":
        task = DEFAULT_TASK
    elif not isinstance(task, str):
        raise InputError(f"column 'task' holds a {type_name(task)}; use text")
    check_characters("task", task)
    kind, told = kind_of(said["kind"], parts.form, row_id, parts.prompt)
    column = mapped.get("document", ("document",))[0]
    document = "" if column in parts.form.columns else _name(values.get(column), column)
    if len(document) > _LONGEST_NAME or "\n" in document:
        raise InputError(
            f"column {column!r} holds a text where a row's document is named; rename the column"
        )
    cue = parts.joiner.rstrip()  # words that join ("\nAnswer: ") are no part of the answer
    prompt, between = parts.prompt + cue, parts.joiner[len(cue) :]
    row = Row(row_id, prompt, parts.output, task, kind, between, document, parts.turns)
    by = "the column document" if document else "the id" if document_in(row.id) else _ALONE
    return row, (", ".join(parts.form.columns), told, by)


def _name(value: object, column: str) -> str:
    """An id or the name of a document; empty where there is none."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"column {column!r} holds a {type_name(value)}; use text or a whole number")
    check_characters(column, str(value))
    return str(value)


def normalised(row: Row) -> str:
    """The whole text with every space as one, in one Unicode form: what makes two rows the same."""
    return " ".join(same_form(row.text).split())


def listed(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - _LISTED_IDS} more" if len(ids) > _LISTED_IDS else ""
    return ", ".join(ids[:_LISTED_IDS]) + more


def _digest(rows: Iterable[Row]) -> str:
    return hashlib.sha256("\n".join(repr(astuple(row)) for row in rows).encode()).hexdigest()
