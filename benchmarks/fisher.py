"""Times LIBU's exact per-example Fisher against one plain backward pass over the same rows.

    python benchmarks/fisher.py --model DIRECTORY --retain rows.jsonl --output fisher.md

A: forward and backward of the mean loss over the rows, with the adapter's gradients and nothing per
example. B: LIBU's Fisher. Both take the same batches of the same model in one process, in turn, after
one round that is not counted; the figure is the median of B / A over the rounds, in seconds on the
clock and in the processor's, which others on the machine disturb less. Memory is what a pass adds to
the peak of a process of its own (Linux only), at one, two and four times `--memory-rows` rows, the
longest first. Before that, the Fisher is compared with one backward pass an example.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from expunge.data.batches import PAD_ID, Batch, collate, in_order
from expunge.data.rows import read_rows
from expunge.data.tokenization import Example, TextPolicy, encode_rows
from expunge.maths.numerics import row_means
from expunge.methods.base import Context
from expunge.methods.influence_step import InfluenceStep
from expunge.methods.libu import LIBU, LIBUObjective
from expunge.models.loading import check_model, load_model
from expunge.reporting.tables import markdown

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models" / "lume-mini"
SIDES = ("plain", "fisher")
STATUS = Path("/proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SHARED))
    parser.add_argument("--retain", default=str(SHARED / "retain.jsonl"))
    parser.add_argument("--rows", type=int, default=64, help="rows of the timed passes")
    parser.add_argument("--memory-rows", type=int, default=64, help="rows of the smallest pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=LIBU().rank)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="write the tables here as markdown")
    parser.add_argument("--probe", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    examples, context = _prepared(arguments)
    objective = LIBU(rank=arguments.rank).start(context)
    with torch.no_grad():
        # As after phase 1, and large enough for the gradient of A to count.
        for name, parameter in objective.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: _plain(objective, context, examples),
        "fisher": lambda: InfluenceStep(objective, context).diagonal_fisher(examples),
    }
    if arguments.probe:
        print(_added_by(sides[arguments.probe]))
        return

    text = "\n".join([_exactness(objective, context, examples), *_times(sides, arguments.rounds)])
    text += "\n\n" + _memory(arguments, objective) + "\n\n"
    tokens = sum(map(len, examples))
    text += (
        f"{arguments.model}: {len(examples)} rows, {tokens} tokens, batches of"
        f" {arguments.batch_size}, rank {arguments.rank}, {arguments.dtype}. {_processor()},"
        f" {arguments.threads} thread(s) of {psutil.cpu_count()}, torch {torch.__version__}.\n"
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


def _prepared(arguments: argparse.Namespace) -> tuple[Sequence[Example], Context]:
    """The longest rows, and a context whose own sets are short: start() makes passes over them."""
    checked = check_model(arguments.model)
    model = load_model(checked, arguments.dtype, "cpu")
    policy = TextPolicy(checked.context)
    rows = read_rows(arguments.retain, "retain")
    examples = encode_rows(rows, checked.tokenizer, policy, eos=True)
    examples = sorted(examples, key=len, reverse=True)[: arguments.rows]
    low = arguments.dtype == "bfloat16"
    context = Context(
        model=model,
        layout=checked.layout,
        forget=examples[-2:],
        retain=examples[-4:-2],
        pad_id=PAD_ID,
        batch_size=arguments.batch_size,
        seed=0,
        device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=low),
        progress=lambda _name, _done, _total: None,
    )
    return examples, context


def _plain(objective: LIBUObjective, context: Context, examples: Sequence[Example]) -> None:
    for batch in in_order(examples, context.batch_size, context.pad_id):
        with context.autocast():
            objective.cross_entropy(batch).backward()
    for parameter in objective.parameters.values():
        parameter.grad = None


def _exactness(objective: LIBUObjective, context: Context, examples: Sequence[Example]) -> str:
    """The Fisher of 32 rows against one backward pass a row, in the model's dtype."""
    chosen = examples[:: max(1, len(examples) // 32)][:32]
    found = InfluenceStep(objective, context).diagonal_fisher(chosen)
    expected = {name: torch.zeros_like(p) for name, p in objective.parameters.items()}
    for index in range(len(chosen)):
        for name, square in _alone(objective, context, collate(chosen, [index], context.pad_id)):
            expected[name] += square / len(chosen)
    worst = max(
        float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected
    )
    entry = max(
        float(((found[name] - e).abs() / e.clamp(min=1e-6 * float(e.max()))).max())
        for name, e in expected.items()
    )
    return (
        f"Against {len(chosen)} rows one at a time: largest relative error of a weight's Fisher"
        f" {worst:.1e} (norm), of an entry {entry:.1e}."
    )


def _alone(objective: LIBUObjective, context: Context, batch: Batch) -> list[tuple[str, torch.Tensor]]:
    with context.autocast():
        log_probs, mask = objective.log_probs(batch)
        loss = -row_means(log_probs, mask).sum()
    gradients = torch.autograd.grad(loss, list(objective.parameters.values()))
    squares = [int(mask.sum()) * gradient.square() for gradient in gradients]
    return list(zip(objective.parameters, squares, strict=True))


def _times(sides: dict[str, Callable[[], object]], rounds: int) -> list[str]:
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    seconds: dict[tuple[str, str], list[float]] = {(c, s): [] for c in clocks for s in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            started = {clock: read() for clock, read in clocks.items()}
            side()
            for clock, read in clocks.items():
                seconds[clock, name].append(read() - started[clock])
    lines = []
    for clock in clocks:
        plain, fisher = (seconds[clock, name][1:] for name in SIDES)
        ratios = [b / a for a, b in zip(plain, fisher, strict=True)]
        numbers = (statistics.median(plain), statistics.median(fisher), statistics.median(ratios))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append([clock, *(f"{number:.2f}" for number in numbers), spread])
    header = ("", "plain pass, s", "Fisher, s", "median of ratios", f"{rounds} rounds")
    return ["", markdown(header, lines)]


def _memory(arguments: argparse.Namespace, objective: LIBUObjective) -> str:
    """Peak growth by number of rows; every pass has a process of its own."""
    size = sum(4 * p.numel() for p in objective.parameters.values()) / 2**20
    lines = []
    for rows in (arguments.memory_rows * factor for factor in (1, 2, 4)):
        grown = [_probe(arguments, side, rows) for side in SIDES]
        lines.append([str(rows), *(f"{mebibytes:.1f}" for mebibytes in grown)])
    header = ("rows", "plain pass, MiB", "Fisher, MiB")
    return markdown(header, lines) + f"\n\nThe adapter has {size:.1f} MiB."


def _probe(arguments: argparse.Namespace, side: str, rows: int) -> float:
    options = {
        "model": arguments.model,
        "retain": arguments.retain,
        "rows": rows,
        "threads": arguments.threads,
        "batch-size": arguments.batch_size,
        "rank": arguments.rank,
        "dtype": arguments.dtype,
        "probe": side,
    }
    command = [sys.executable, __file__]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    # Freed blocks go back to the system at once, so that the peak is that of live tensors.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)
    return float(result.stdout.strip())


def _added_by(side: Callable[[], object]) -> float:
    """MiB by which the process's peak exceeds what it held before."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    kept = side()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
