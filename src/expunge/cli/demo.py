"""`expunge demo`: the main job on the built-in benchmark, from memorised to scorecards and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from expunge.cli.compare import show
from expunge.cli.console import progress_on_stderr
from expunge.cli.options import parse, take_flag
from expunge.disk import check_writable
from expunge.errors import InputError
from expunge.evaluation.measuring import MeasureInputs, measure
from expunge.evaluation.score_files import SCORES
from expunge.methods.base import Method
from expunge.methods.catalog import METHODS
from expunge.models.kernels import quick_dtype
from expunge.models.loading import resolve_device
from expunge.reporting.material import ReportInputs
from expunge.reporting.report import PAGE, write_report
from expunge.training.options import TrainingOptions
from expunge.training.run import RunInputs, run


@dataclass(frozen=True)
class Demo:
    """expunge demo [--output demo]

    Makes a small model that memorised synthetic stories and biographies, unlearns half of them with
    LIBU and with Adaptive RMU, and prints the scorecards beside those of the model before and of an
    oracle that never saw that half. Each result gets a report, OUTPUT/METHOD/report.html.
    """

    output: str = "demo"
    """Directory for the unlearned models and the scores."""
    methods: tuple[str, ...] = ("libu", "adaptive-rmu")
    """Methods to run, with their default settings."""
    seed: int = 0
    """Seed of the benchmark and of the runs."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Products of the runs; auto: bfloat16 where the device has them. The files stay in float32."""
    overwrite: bool = False
    """Replace the runs of an earlier demo."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise InputError(f"--methods: is empty; choose from {', '.join(METHODS)}")
        for name in self.methods:
            if name not in METHODS:
                raise InputError(f"--methods {name}: unknown; choose from {', '.join(METHODS)}")


def main(arguments: Sequence[str]) -> int:
    """Builds, runs, measures, prints."""
    from expunge.benchmark.build import build, default_directory
    from expunge.benchmark.generator import BenchmarkSettings

    arguments, quiet = take_flag(list(arguments), "--quiet")
    settings = parse(Demo, arguments, "expunge demo", "output")
    output = Path(settings.output)
    check_writable(output, inside=True)
    taken = [name for name in settings.methods if (output / name).exists()]
    if taken and not settings.overwrite:
        raise InputError(
            f"--output {output}: holds {', '.join(taken)} of an earlier demo;"
            " choose another directory or give --overwrite"
        )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = quick_dtype(torch.device(resolve_device(settings.device)).type)
    benchmark = BenchmarkSettings(seed=settings.seed)
    with progress_on_stderr(quiet=quiet) as progress:
        built = build(default_directory(benchmark), benchmark, progress.phase)
        progress.message(f"benchmark: {built.directory}")
        models = {"target": built.target, "oracle": built.oracle}
        for name in settings.methods:
            inputs = RunInputs(
                model=str(built.target),
                forget=str(built.forget),
                retain=str(built.retain),
                nonmembers=str(built.calibration),
                output=str(output / name),
                device=settings.device,
                dtype=dtype,
                overwrite=settings.overwrite,
            )
            method: Method = METHODS[name]()
            manifest = run(inputs, method, TrainingOptions(seed=settings.seed), progress)
            progress.message(f"{output / name}: {manifest['seconds']['total']:.0f} s")
            models[name] = output / name
    cards = {}
    for name, model in models.items():
        scores = output / name / SCORES if name in settings.methods else output / f"{name}.json"
        evaluation = MeasureInputs(
            model=str(model),
            forget=str(built.forget),
            retain=str(built.retain),
            nonmembers=str(built.nonmembers),
            mmlu=str(built.mmlu),
            output=str(scores),
            device=settings.device,
        )
        with progress_on_stderr(quiet=quiet) as progress:
            cards[name] = measure(evaluation, progress.phase)
    with progress_on_stderr(quiet=quiet) as progress:
        for name in settings.methods:
            write_report(ReportInputs(run=str(output / name)))
            progress.message(f"report: {output / name / PAGE}")
    show(cards)
    return 0
