"""Runs methods with their default settings on one model and writes their scorecards as a table.

    python benchmarks/scorecards.py builtin --output runs/builtin
    python benchmarks/scorecards.py DIRECTORY --output runs/mine --methods libu adaptive-rmu

Runs are calibrated against calibration.jsonl, text that scoring does not use; without that file against
nonmembers.jsonl. DIRECTORY holds a model (in `target/` or itself) with forget.jsonl, retain.jsonl and,
where they exist, nonmembers.jsonl, mmlu/ and oracle/. Runs that are already in the output are not
repeated. The table, with the machine and the time of each run, is written to the output as table.md and
printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import psutil

from expunge.cli.console import progress_on_stderr
from expunge.errors import RunError
from expunge.evaluation.measuring import MeasureInputs, measure
from expunge.evaluation.score_files import SCORES, read_scores
from expunge.evaluation.scorecard import Cells, Scorecard
from expunge.methods.catalog import METHODS
from expunge.reporting.tables import markdown, number
from expunge.training.options import TrainingOptions
from expunge.training.run import MANIFEST, RunInputs, run

HEADER = (
    "model",
    "forget regurgitation ↓",
    "forget knowledge ↓",
    "retain regurgitation ↑",
    "retain knowledge ↑",
    "task aggregate ↑",
    "MIA AUC → 0.5",
    "utility ↑",
    "final ↑",
    "seconds",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="builtin, or a directory with a model and its rows")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()

    directory = _builtin() if arguments.directory == "builtin" else Path(arguments.directory)
    target = directory / "target" if (directory / "target").is_dir() else directory
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = [_line("target", _scores(target, directory, arguments.output / "target.json"), None)]
    if (directory / "oracle").is_dir():
        oracle = _scores(directory / "oracle", directory, arguments.output / "oracle.json")
        lines.append(_line("oracle", oracle, None))
    for name in arguments.methods:
        lines.append(_measured(name, target, directory, arguments.output / name))
        print(lines[-1], flush=True)
    machine = (
        f"{psutil.cpu_count(logical=False)} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}"
    )
    text = markdown(HEADER, lines) + f"\nDefault settings, seed 0, float32, {machine}.\n"
    (arguments.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


def _builtin() -> Path:
    from expunge.benchmark.build import build, default_directory
    from expunge.benchmark.generator import BenchmarkSettings

    settings = BenchmarkSettings()
    with progress_on_stderr(quiet=False) as progress:
        return build(default_directory(settings), settings, progress.phase).directory


def _measured(name: str, target: Path, directory: Path, output: Path) -> list[str]:
    if not (output / MANIFEST).is_file():
        inputs = RunInputs(
            model=str(target),
            forget=str(directory / "forget.jsonl"),
            retain=str(directory / "retain.jsonl"),
            nonmembers=_where(directory / "calibration.jsonl")
            or _where(directory / "nonmembers.jsonl"),
            output=str(output),
        )
        try:
            with progress_on_stderr(quiet=False) as progress:
                run(inputs, METHODS[name](), TrainingOptions(), progress)
        except RunError:
            return [name, "no checkpoint could be kept", *[""] * (len(HEADER) - 2)]
    seconds = json.loads((output / MANIFEST).read_text(encoding="utf-8"))["seconds"]["total"]
    return _line(name, _scores(output, directory, output / SCORES), seconds)


def _scores(model: Path, directory: Path, file: Path) -> Scorecard:
    if not file.is_file():
        settings = MeasureInputs(
            model=str(model),
            forget=str(directory / "forget.jsonl"),
            retain=str(directory / "retain.jsonl"),
            nonmembers=_where(directory / "nonmembers.jsonl"),
            mmlu=_where(directory / "mmlu"),
            output=str(file),
        )
        with progress_on_stderr(quiet=False) as progress:
            measure(settings, progress.phase)
    return read_scores(str(file))


def _where(path: Path) -> str | None:
    return str(path) if path.exists() else None


def _line(name: str, card: Scorecard, seconds: float | None) -> list[str]:
    return [
        name,
        number(_mean(card.forget, "regurgitation")),
        number(_mean(card.forget, "knowledge")),
        number(_mean(card.retain, "regurgitation")),
        number(_mean(card.retain, "knowledge")),
        *(
            number(value)
            for value in (card.task_aggregate, card.mia_auc, card.utility, card.final_score)
        ),
        "-" if seconds is None else f"{seconds:.0f}",
    ]


def _mean(cells: Cells, name: str) -> float | None:
    values = [value for cell in cells.values() if (value := cell[name]) is not None]
    return statistics.fmean(values) if values else None


if __name__ == "__main__":
    main()
