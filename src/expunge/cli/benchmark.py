"""`expunge benchmark build`: rows, target model and oracle of the built-in benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.cli.console import progress_on_stderr
from expunge.cli.help import HELP
from expunge.cli.options import parse
from expunge.disk import check_writable
from expunge.errors import InputError


@dataclass(frozen=True)
class Build:
    """expunge benchmark build DIR [--seed S]

    Writes the rows of the built-in benchmark: forget, retain, non-members, paraphrases and a
    four-choice quiz. Trains the target model, which memorises all of them, and the oracle, which
    never saw the forget set. A directory that already holds the same is left as it is.
    """

    directory: str
    """Directory to write."""
    seed: int = 0
    """Seed of the generator and of the training."""


def main(arguments: Sequence[str]) -> int:
    """Parses, builds, says where everything is."""
    if arguments[:1] != ["build"] and not {*HELP} & {*arguments[:1]}:
        raise InputError("benchmark: knows one subcommand; write expunge benchmark build DIR")
    words = arguments[1:] if arguments[:1] == ["build"] else arguments
    settings = parse(Build, words, "expunge benchmark build", "directory")
    from expunge.benchmark.build import build
    from expunge.benchmark.generator import BenchmarkSettings

    check_writable(Path(settings.directory), inside=True, option="DIR")
    with progress_on_stderr() as progress:
        built = build(Path(settings.directory), BenchmarkSettings(seed=settings.seed), progress.phase)
        progress.message(f"target model: {built.target}")
        progress.message(f"oracle: {built.oracle}")
        progress.message(f"rows: {built.forget}, {built.retain}")
    return 0
