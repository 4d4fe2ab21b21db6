"""`expunge data inspect`: check rows, and show how one is tokenised and masked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from expunge.cli.help import HELP
from expunge.cli.options import Printed, parse, print_json
from expunge.data.formats import Role
from expunge.data.rows import Reading, Row, RowSet
from expunge.data.tokenization import Example, LongRows, encode_rows
from expunge.errors import InputError, near
from expunge.models.loading import check_model
from expunge.models.text_forms import text_policy
from expunge.reporting.tables import table_console

_MASKED = "•••"
_TOLD = {"columns": "read from", "kind": "kind told by", "document": "document told by"}


@dataclass(frozen=True)
class Inspect(Printed, Reading):
    """expunge data inspect ROWS --model MODEL [--row ID] [--reveal]

    Checks and counts the rows. Shows which columns were read, and by what kind and document were
    found. With --row shows one row's tokens, which of them a loss counts and which are the answer.
    Text and token ids are masked without --reveal.
    """

    rows: str
    """The rows: a file, a directory with <role>.*, or a hub data set id."""
    model: str
    """The model whose tokenizer is used: a directory, or a hub id."""
    role: Role = "forget"
    """Which side the rows are; retained rows end with EOS, and directories are searched by it."""
    row: str | None = None
    """Id of a row to show token by token."""
    chat_template: Literal["on", "off"] = "off"
    """Render the row with the chat template. No weights are read here to choose by."""
    long_rows: LongRows = "refuse"
    """Refuse rows longer than the context, or cut them into windows."""
    trust_remote_code: bool = False
    """Run code that the model's directory brings along."""
    reveal: bool = False
    """Show text and token ids."""


def main(arguments: Sequence[str]) -> int:
    """Parses, checks, prints."""
    if arguments[:1] != ["inspect"] and not {*HELP} & {*arguments[:1]}:
        raise InputError("data: knows one subcommand; write expunge data inspect ROWS --model MODEL")
    words = arguments[1:] if arguments[:1] == ["inspect"] else arguments
    settings = parse(Inspect, words, "expunge data inspect", "rows")
    checked = check_model(settings.model, trust_remote_code=settings.trust_remote_code)
    rows = settings.read(settings.rows, settings.role)
    policy = text_policy(
        checked, chat_template=settings.chat_template == "on", long_rows=settings.long_rows
    )
    eos = settings.role == "retain"
    examples = encode_rows(rows, checked.tokenizer, policy, eos=eos)
    report: dict[str, Any] = _summary(rows, examples) | {"text": policy.describe(checked.tokenizer)}
    if settings.row is not None:
        row = _find(rows, settings.row)
        windows = [example for example in examples if example.row_id == row.id]
        report["row"] = _row(row, windows, checked.tokenizer, reveal=settings.reveal)
    if settings.json:
        print_json(report)
    else:
        _print(report)
    return 0


def _summary(rows: RowSet, examples: Sequence[Example]) -> dict[str, Any]:
    lengths = sorted(map(len, examples))
    return {
        "rows": len(rows),
        "sequences": len(examples),
        "by_task_and_kind": {
            f"{task} {kind}": count
            for (task, kind), count in sorted(Counter((r.task, r.kind) for r in rows).items())
        },
        "read": rows.read,
        "joiners": Counter(row.joiner for row in rows),
        "tokens": {
            "total": sum(lengths),
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
            "answer": sum(sum(example.answer_mask) for example in examples),
        },
    }


def _find(rows: RowSet, row_id: str) -> Row:
    by_id = {row.id: row for row in rows}
    if row_id not in by_id:
        mend = near(repr(row_id), map(repr, by_id), f"the first is {next(iter(by_id))!r}")
        raise InputError(f"--row {row_id}: no such row in {rows.source}; {mend}")
    return by_id[row_id]


def _row(row: Row, windows: Sequence[Example], tokenizer: Any, *, reveal: bool) -> dict[str, Any]:
    tokens = []
    for window, example in enumerate(windows):
        for position, token_id in enumerate(example.input_ids):
            part = "answer" if example.answer_mask[position] else "prompt"
            tokens.append(
                {
                    "window": window,
                    "position": position,
                    "part": part if example.token_mask[position] else "not counted",
                    "label": token_id
                    if reveal and example.answer_mask[position]
                    else (_MASKED if example.answer_mask[position] else -100),
                    "id": token_id if reveal else _MASKED,
                    "token": tokenizer.decode([token_id]) if reveal else _MASKED,
                }
            )
    return {"id": row.id, "task": row.task, "kind": row.kind, "tokens": tokens}


def _print(report: dict[str, Any]) -> None:
    console = table_console()
    console.print(f"{report['rows']} rows, {report['sequences']} sequences")
    for name, count in report["by_task_and_kind"].items():
        console.print(f"  {name}: {count}")
    for about, counts in report["read"].items():
        told = ", ".join(f"{what} ({count})" for what, count in counts.items())
        console.print(f"{_TOLD[about]}: {told}")
    joiners = ", ".join(f"{joiner!r} ({count})" for joiner, count in report["joiners"].items())
    console.print(f"joined by: {joiners}")
    tokens = report["tokens"]
    console.print(
        f"tokens: {tokens['total']} ({tokens['answer']} of answers),"
        f" median {tokens['median']}, longest {tokens['longest']}",
    )
    text = report["text"]
    console.print(
        f"context {text['context'] or 'without limit'}, BOS {text['bos']}, EOS {text['eos']},"
        f" chat template {'on' if text['chat_template'] else 'off'}",
    )
    if "row" not in report:
        return
    row = report["row"]
    table = Table(title=f"{row['id']} ({row['task']}, {row['kind']})", title_justify="left")
    for heading in ("window", "position", "part", "label", "id", "token"):
        table.add_column(heading)
    for token in row["tokens"]:
        table.add_row(*(repr(v) if k == "token" and v != _MASKED else str(v) for k, v in token.items()))
    console.print(table)
