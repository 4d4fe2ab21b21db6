"""Other wordings of forget rows: rows with one more column, `of`, the id of the row that they reword."""

from __future__ import annotations

from dataclasses import replace

from expunge.data.formats import open_source
from expunge.data.rows import Row, RowSet, as_rows
from expunge.errors import InputError


def read_paraphrases(source: str, forget: RowSet, *, required: bool) -> dict[str, list[Row]]:
    """By a forget row's id its other wordings; those of other rows (a retain set's) are left out.

    `required` refuses a file without any for this set. Raises InputError that names file and row.
    """
    records = open_source(source, "forget").records
    kinds = {row.id: row for row in forget}
    chosen, owners = [], []
    for record in records:
        owner = record.values.get("of")
        if not isinstance(owner, str | int) or isinstance(owner, bool):
            raise InputError(
                f"{source} {record.place}: has no column 'of'; give the id of the row it rewords"
            )
        if str(owner) in kinds:
            row = kinds[str(owner)]
            values = {name: text for name, text in record.values.items() if name != "of"}
            chosen.append({**values, "task": row.task, "kind": row.kind})
            owners.append(str(owner))
    if not chosen:
        if not required:
            return {}
        raise InputError(
            f"{source}: rewords no row of {forget.source}; its column 'of' must hold their ids"
        )
    found: dict[str, list[Row]] = {}
    try:
        rows = as_rows(chosen, "forget")
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    for owner, row in zip(owners, rows, strict=True):
        found.setdefault(owner, []).append(replace(row, joiner=kinds[owner].joiner))
    return found
