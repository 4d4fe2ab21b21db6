"""What unlearning costs beside the training that taught its target: in one run, on the same threads.

Token passes are the tokens, padding included, that enter a model's embeddings: one for a forward pass,
three where a backward pass follows. The target is trained anew by the recipe of the built-in benchmark;
then each method runs with its defaults on all forget documents, or on the first that make up a share of
the rows that were taught. Seconds of a run leave its first imports out and hold everything else.

    python benchmarks/cost.py [--methods spectral libu] [--shares 1 0.05]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import nn

import expunge.training.loop
import expunge.training.unlearning
from expunge.benchmark.build import BuiltBenchmark, build
from expunge.benchmark.generator import BenchmarkSettings, generate
from expunge.benchmark.pretraining import train_model, train_tokenizer
from expunge.benchmark.recipe import PretrainingSettings, target_texts, tokenizer_texts
from expunge.methods.catalog import METHODS
from expunge.models.kernels import quick_dtype
from expunge.runs.run import RunInputs, run
from expunge.training.options import TrainingOptions


@dataclass
class Cost:
    """Of one piece of work."""

    passes: int = 0
    """Token passes."""
    seconds: float = 0.0
    measuring: float = 0.0
    """Seconds of them that candidates took, the target among them."""


@contextmanager
def metered() -> Iterator[Cost]:
    """Inside, every model's work is added up."""
    cost = Cost()

    def enters(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and module.embedding_dim > 1:
            cost.passes += inputs[0].numel() * (3 if torch.is_grad_enabled() else 1)

    places: Any = (expunge.training.loop, expunge.training.unlearning)
    real = places[0].measure

    def measure(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*arguments)
        finally:
            cost.measuring += time.perf_counter() - began

    for place in places:
        place.measure = measure
    hook = nn.modules.module.register_module_forward_pre_hook(enters)
    began = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - began
        hook.remove()
        for place in places:
            place.measure = real


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(1)  # as the target's training, which would not use more
    settings = BenchmarkSettings(seed=arguments.seed, documents_per_task=arguments.documents)
    pretraining = PretrainingSettings(seed=arguments.seed)
    benchmark = generate(settings)
    tokenizer = train_tokenizer(tokenizer_texts(benchmark), pretraining)
    with metered() as taught:
        train_model(target_texts(benchmark, pretraining), tokenizer, pretraining)
    lines = [
        f"Machine: {describe_machine(1)}. Built-in benchmark, seed {arguments.seed},"
        f" {arguments.documents} documents a task and side. Training the target:"
        f" {taught.passes / 1e6:.2f} million token passes, {taught.seconds:.0f} s.",
        "",
        "| method | forget rows | token passes | of training | seconds | of training | candidates |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        built = build(Path(arguments.benchmark or Path(scratch) / "benchmark"), settings)
        for share in arguments.shares:
            forget = _first(built, share, Path(scratch) / f"forget-{share}.jsonl")
            for name in arguments.methods:
                cost = _run(name, built, forget, Path(scratch) / f"{name}-{share}")
                rows = len(forget.read_text(encoding="utf-8").splitlines())
                lines.append(
                    f"| {name} | {rows} | {cost.passes / 1e6:.2f} million |"
                    f" {cost.passes / taught.passes:.2f} | {cost.seconds:.0f} |"
                    f" {cost.seconds / taught.seconds:.2f} |"
                    f" {cost.measuring / cost.seconds:.0%} of the run |"
                )
                sys.stdout.write(lines[-1] + "\n")
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")


def _first(built: BuiltBenchmark, share: float, path: Path) -> Path:
    """The forget set, or its first documents: so many that they are `share` of all rows taught."""
    rows = [json.loads(line) for line in built.forget.read_text(encoding="utf-8").splitlines()]
    if share < 1:
        retained = len(built.retain.read_text(encoding="utf-8").splitlines())
        most = share * (len(rows) + retained)
        documents = {row["id"][:13]: None for row in rows}
        chosen: list[Any] = []
        for document in documents:
            own = [row for row in rows if row["id"].startswith(document)]
            if chosen and len(chosen) + len(own) > most:
                break
            chosen += own
        rows = chosen
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _run(name: str, built: BuiltBenchmark, forget: Path, output: Path) -> Cost:
    inputs = RunInputs(
        model=str(built.target),
        forget=str(forget),
        retain=str(built.retain),
        nonmembers=str(built.calibration),
        output=str(output),
        dtype=quick_dtype("cpu"),
    )
    with metered() as cost:
        run(inputs, METHODS[name](), TrainingOptions())
    return cost


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["spectral", "libu"], choices=METHODS)
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.05])
    parser.add_argument("--documents", type=int, default=12, help="of each task and side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--benchmark", help="a benchmark of these settings that is built already")
    parser.add_argument("--output", help="also write the table here")
    return parser


if __name__ == "__main__":
    main()
