"""`expunge demo`: the main job on the built-in benchmark, from memorised to scorecards and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from expunge.cli.compare import show
from expunge.cli.console import progress_on_stderr
from expunge.cli.erase import EraseInputs, erase, prepare
from expunge.cli.options import parse
from expunge.cli.run import DEFAULT_METHOD
from expunge.disk import check_writable
from expunge.errors import InputError
from expunge.evaluation.score_files import SCORES, read_scores
from expunge.evaluation.scorecard import Scorecard
from expunge.methods.catalog import METHODS
from expunge.models.devices import resolve_device
from expunge.models.kernels import quick_dtype
from expunge.reporting.material import BEFORE, ORACLE
from expunge.training.options import TrainingOptions

_LAYERS = 4
"""Half of the benchmark's own: training both models is most of what a newcomer waits for."""


@dataclass(frozen=True)
class Demo:
    """expunge demo [--output demo]

    Makes a small model that memorised synthetic stories and biographies, and erases half of them as
    `expunge erase` does. Scores the result beside the model before and an oracle, attacks it, and
    ends with a verdict. The report is OUTPUT/METHOD/report.html.
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
    """Dtype of the runs' products; auto: bfloat16 if the device has it. The files stay in
    float32."""
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
    with progress_on_stderr() as progress:
        built = build(default_directory(benchmark, smaller), benchmark, progress.phase, smaller)
        progress.message(f"benchmark: {built.directory}")
    cards: dict[str, Scorecard] = {}
    for name in settings.methods:
        inputs = EraseInputs(
            model=str(built.target),
            forget=str(built.forget),
            retain=str(built.retain),
            calibration=str(built.calibration),
            nonmembers=str(built.nonmembers),
            oracle=str(built.oracle),
            paraphrases=str(built.paraphrases),
            mmlu=str(built.mmlu),
            output=str(output / name),
            audit=settings.audit,
            device=settings.device,
            dtype=dtype,
            overwrite=settings.overwrite,
            resume=settings.resume,
        )
        task = prepare(inputs, METHODS[name](), TrainingOptions(seed=settings.seed))
        erase(task, cache=str(output / "audit-cache"))
        names = {"target": BEFORE, "oracle": ORACLE, name: SCORES}
        cards |= {model: read_scores(str(output / name / file)) for model, file in names.items()}
    if settings.methods[1:]:
        show(cards)
    return 0
