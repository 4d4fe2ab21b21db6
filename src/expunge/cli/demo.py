"""`expunge demo`: the main job on the built-in benchmark, from memorised to scorecards and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from expunge.audits.auditing import audit
from expunge.audits.inputs import AuditInputs
from expunge.cli.audit import show as show_audit
from expunge.cli.compare import show
from expunge.cli.console import progress_on_stderr
from expunge.cli.options import parse, take_flag
from expunge.cli.run import DEFAULT_METHOD
from expunge.disk import check_writable
from expunge.errors import InputError
from expunge.evaluation.measuring import MeasureInputs, measure
from expunge.evaluation.score_files import SCORES
from expunge.methods.base import Method
from expunge.methods.catalog import METHODS
from expunge.models.kernels import quick_dtype
from expunge.models.loading import resolve_device
from expunge.reporting.material import AUDIT, ReportInputs
from expunge.reporting.report import PAGE, write_report
from expunge.training.options import TrainingOptions
from expunge.training.run import RunInputs, run

_LAYERS = 4
"""Half of the benchmark's own: training both models is most of what a newcomer waits for."""


@dataclass(frozen=True)
class Demo:
    """expunge demo [--output demo]

    Makes a small model that memorised synthetic stories and biographies, unlearns half of them, and
    prints the scorecards of the result, of the model before and of an oracle that never saw that half.
    Then attacks the result and ends with a verdict and its report, OUTPUT/METHOD/report.html.
    """

    output: str = "demo"
    """Directory for the unlearned models and the scores."""
    methods: tuple[str, ...] = (DEFAULT_METHOD,)
    """Methods to run, with their default settings."""
    documents: int = 6
    """Documents of each task on each side; `expunge benchmark build` makes 12."""
    audit: bool = True
    """Attack each result at the budget quick."""
    seed: int = 0
    """Seed of the benchmark and of the runs."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Products of the runs; auto: bfloat16 where the device has them. The files stay in float32."""
    overwrite: bool = False
    """Replace the runs of an earlier demo."""
    resume: bool = False
    """Go on with a demo that was interrupted."""

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
    from expunge.benchmark.recipe import PretrainingSettings

    arguments, quiet = take_flag(list(arguments), "--quiet")
    settings = parse(Demo, arguments, "expunge demo", "output")
    output = Path(settings.output)
    check_writable(output, inside=True)
    taken = [name for name in settings.methods if (output / name).exists()]
    if taken and not (settings.overwrite or settings.resume):
        raise InputError(
            f"--output {output}: holds {', '.join(taken)} of an earlier demo;"
            " choose another directory, or give --overwrite or --resume"
        )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = quick_dtype(torch.device(resolve_device(settings.device)).type)
    benchmark = BenchmarkSettings(seed=settings.seed, documents_per_task=settings.documents)
    smaller = PretrainingSettings(layers=_LAYERS, seed=settings.seed)
    with progress_on_stderr(quiet=quiet) as progress:
        built = build(default_directory(benchmark, smaller), benchmark, progress.phase, smaller)
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
                resume=settings.resume,
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
    show(cards)
    for name in settings.methods if settings.audit else ():
        attacked = AuditInputs(
            model=str(output / name),
            original=str(built.target),
            oracle=str(built.oracle),
            forget=str(built.forget),
            retain=str(built.retain),
            nonmembers=str(built.nonmembers),
            paraphrases=str(built.paraphrases),
            cache=str(output / "audit-cache"),
            output=str(output / name / AUDIT),
            device=settings.device,
            seed=settings.seed,
        )
        with progress_on_stderr(quiet=quiet) as progress:
            show_audit(audit(attacked, progress), attacked)
    with progress_on_stderr(quiet=quiet) as progress:
        for name in settings.methods:
            write_report(ReportInputs(run=str(output / name)))
            progress.message(f"report: {output / name / PAGE}")
    return 0
