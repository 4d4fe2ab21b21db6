"""`expunge evaluate`: a model's scorecard."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from expunge.cli.console import progress_on_stderr
from expunge.cli.options import parse, take_flag
from expunge.data.rows import read_rows
from expunge.data.tokenization import LongRows
from expunge.errors import InputError
from expunge.evaluation.findings import findings
from expunge.evaluation.multiple_choice import read_questions
from expunge.evaluation.scorecard import Scorecard, check_material, evaluate_model
from expunge.models.loading import Dtype, check_model, load_model, resolve_device, text_policy
from expunge.reporting.tables import scorecard_table


@dataclass(frozen=True)
class Evaluate:
    """expunge evaluate MODEL --forget F --retain R [--nonmembers N] [--mmlu DIR] [--output FILE]

    Measures regurgitation, knowledge, membership inference and utility by the protocol of
    SemEval-2025 Task 4. Prints a table, or JSON with --json. --quiet shows no progress.
    """

    model: str
    """The model to measure: a directory, or a hub id."""
    forget: str
    """Rows that were to be removed."""
    retain: str | None = None
    """Rows that were to stay; without them there is no task aggregate."""
    members: str | None = None
    """Text that the target was trained on, for membership inference; null: the forget set's."""
    nonmembers: str | None = None
    """Never-seen text of the forget set's kind, for membership inference."""
    mmlu: str | None = None
    """Directory in MMLU's format: test/<subject>_test.csv, dev/<subject>_dev.csv."""
    mmlu_shots: int = 0
    """Solved examples from dev/ before each question."""
    output: str | None = None
    """Write scores.json here."""
    records: str | None = None
    """Write one JSON line a row here: id, split, task, kind, score."""
    reveal: bool = False
    """Add what was generated to the records; it can hold forgotten text."""
    batch_size: int = 64
    """Rows a batch; it changes the speed, never a score."""
    dtype: Dtype = "float32"
    """Dtype that the model is loaded and run in."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    chat_template: bool = False
    """Render prompts with the tokenizer's chat template."""
    long_rows: LongRows = "refuse"
    """Refuse rows longer than the context, or score them in windows."""
    trust_remote_code: bool = False
    """Run code that the model's directory brings along."""
    json: bool = False
    """Print JSON instead of the table."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be 1 or more")
        if self.mmlu_shots < 0:
            raise InputError(f"--mmlu-shots {self.mmlu_shots}: must be 0 or more")
        if self.mmlu_shots and self.mmlu is None:
            raise InputError("--mmlu-shots: needs --mmlu with the questions")
        if self.members is not None and self.nonmembers is None:
            raise InputError("--members: is compared with never-seen text; give --nonmembers")
        if self.reveal and self.records is None:
            raise InputError("--reveal: adds text to the records; give --records FILE")


def main(arguments: Sequence[str]) -> int:
    """Parses, measures, prints."""
    arguments, quiet = take_flag(list(arguments), "--quiet")
    settings = parse(Evaluate, arguments, "expunge evaluate")
    card = measure(settings, quiet=quiet)
    if settings.output is not None:
        write_scores(card, Path(settings.output), settings.model)
    if settings.records is not None:
        _write_records(card, Path(settings.records), reveal=settings.reveal)
    if settings.json:
        sys.stdout.write(json.dumps(card.to_json(), indent=2) + "\n")
        return 0
    console = Console(markup=False)
    console.print(
        scorecard_table({Path(settings.model).name: card}, f"Scorecard of {settings.model}")
    )
    for finding in findings(card):
        console.print(finding, markup=False, highlight=False)
    return 0


def measure(settings: Evaluate, *, quiet: bool) -> Scorecard:
    """Checks every input, then loads the model and measures it."""
    for option in ("output", "records"):
        path = getattr(settings, option)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InputError(f"--{option} {path}: its directory does not exist; make it first")
        if path is not None and Path(path).is_dir():
            raise InputError(f"--{option} {path}: is a directory; name a file")
    device = resolve_device(settings.device)
    checked = check_model(settings.model, trust_remote_code=settings.trust_remote_code)
    forget = read_rows(settings.forget, "forget")
    retain = None if settings.retain is None else read_rows(settings.retain, "retain")
    nonmembers = members = None
    if settings.nonmembers is not None:
        nonmembers = read_rows(settings.nonmembers, "nonmembers")
    if settings.members is not None:
        members = read_rows(settings.members, "forget")
    questions, examples = None, None
    if settings.mmlu is not None:
        questions, examples = read_questions(Path(settings.mmlu), settings.mmlu_shots)
    policy = text_policy(
        checked, chat_template=settings.chat_template, long_rows=settings.long_rows
    )
    check_material(checked.tokenizer, forget, retain, nonmembers, questions, examples, policy)
    model = load_model(checked, settings.dtype, device)
    with progress_on_stderr(quiet=quiet) as progress:
        return evaluate_model(
            model,
            checked.tokenizer,
            forget,
            retain,
            nonmembers,
            questions,
            examples,
            members=members,
            policy=policy,
            batch_size=settings.batch_size,
            progress=progress.phase,
        )


def write_scores(card: Scorecard, path: Path, model: str) -> None:
    """Writes scores.json."""
    text = json.dumps({"model": model, **card.to_json()}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _write_records(card: Scorecard, path: Path, *, reveal: bool) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in card.records:
            shown = {k: v for k, v in record.items() if reveal or k != "generated"}
            file.write(json.dumps(shown) + "\n")
