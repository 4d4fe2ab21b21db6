"""What the benchmarks run on, and how: a model with its rows, and commands in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from expunge.evaluation.score_files import read_scores
from expunge.evaluation.scorecard import Scorecard

FAILED = "failed.json"


@dataclass(frozen=True)
class Material:
    """A target model and what it is unlearned and scored with."""

    directory: Path

    @property
    def target(self) -> Path:
        """The target model's directory."""
        inside = self.directory / "target"
        return inside if inside.is_dir() else self.directory

    def options(self, **names: str) -> list[str]:
        """Files as options of a command, those that exist; `names` are of files, by option."""
        found = []
        for option, name in names.items():
            if (self.directory / name).exists():
                found += [f"--{option.replace('_', '-')}", str(self.directory / name)]
        return found

    @property
    def rows(self) -> list[str]:
        """What is forgotten and kept."""
        return self.options(forget="forget.jsonl", retain="retain.jsonl")

    @property
    def run_options(self) -> list[str]:
        """Rows of a run; never-seen text that scoring does not use where there is some."""
        calibrated = (self.directory / "calibration.jsonl").exists()
        name = "calibration.jsonl" if calibrated else "nonmembers.jsonl"
        return [*self.rows, *self.options(calibration=name)]

    @property
    def score_options(self) -> list[str]:
        """What a model is scored with."""
        return [*self.rows, *self.options(nonmembers="nonmembers.jsonl", mmlu="mmlu")]

    @property
    def sweep_options(self) -> list[str]:
        """What the trials of a sweep run on and are scored with."""
        scored_with = self.options(score_nonmembers="nonmembers.jsonl", mmlu="mmlu")
        return [*self.run_options, *scored_with]


def built(seed: int) -> Material:
    """The built-in benchmark of a seed, from the cache where it is there."""
    from expunge.benchmark.build import build, default_directory
    from expunge.benchmark.generator import BenchmarkSettings
    from expunge.cli.console import progress_on_stderr

    settings = BenchmarkSettings(seed=seed)
    with progress_on_stderr() as progress:
        return Material(build(default_directory(settings), settings, progress.phase).directory)


def attempted(command: list[str], output: Path, name: str) -> str | None:
    """Carries a command out unless it failed before; why it failed, or None."""
    failed = output.with_name(f"{output.name}.{FAILED}")
    if failed.is_file():
        reason: str = json.loads(failed.read_text(encoding="utf-8"))["reason"]
        return reason
    done = expunge(command)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode in (130, 143) or done.returncode < 0:
        raise SystemExit(f"{name}: {lines[-1]}")  # asked to stop: goes on next time
    failed.write_text(json.dumps({"reason": lines[-1]}) + "\n", encoding="utf-8")
    return lines[-1]


def scored(model: Path, material: Material, file: Path) -> Scorecard:
    """The scorecard of a model, measured unless it was."""
    if not file.is_file():
        options = [*material.score_options, "--output", str(file), "--quiet"]
        done = expunge(["evaluate", str(model), *options])
        if done.returncode != 0:
            raise SystemExit(f"{model}: {done.stderr.strip()}")
    return read_scores(str(file))


def expunge(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "expunge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
