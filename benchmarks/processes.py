"""Two processes against one, one thread each: time of a training step, and how far the results agree.

    python benchmarks/processes.py --model ../shared/models/lume-mini --rounds 3

Efficiency is t(1) / (2 t(2)): 1 where two processes take half the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a model with its rows beside it")
    parser.add_argument("--methods", nargs="+", default=["adaptive-rmu", "libu"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from machine import describe_machine

    lines = [
        f"Machine: {describe_machine(1)} (a process); {arguments.steps} steps, batch 16, medians of"
        f" {arguments.rounds} rounds.",
        "",
        "| method | step with 1 process, s | with 2, s | efficiency | last loss differs by |"
        " weights differ by |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_compare(arguments, method) for method in arguments.methods]
    sys.stdout.write("\n".join(lines) + "\n")


def _compare(arguments: argparse.Namespace, method: str) -> str:
    rounds: list[tuple[dict[str, Any], dict[str, Any], float]] = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            paths = [Path(scratch) / name for name in ("one", "two")]
            for count, path in enumerate(paths, 1):
                _run(arguments, method, path, count)
            rounds.append((_last(paths[0]), _last(paths[1]), _apart(arguments.model, *paths)))
    seconds = [
        statistics.median(r[0]["median"] for r in rounds),
        statistics.median(r[1]["median"] for r in rounds),
    ]
    efficiency = statistics.median(r[0]["median"] / (2 * r[1]["median"]) for r in rounds)
    loss = max(abs(r[0]["loss"] - r[1]["loss"]) / abs(r[0]["loss"]) for r in rounds)
    return (
        f"| {method} | {seconds[0]:.3f} | {seconds[1]:.3f} | {efficiency:.2f} | {loss:.1e} |"
        f" {max(r[2] for r in rounds):.1e} |"
    )


def _run(arguments: argparse.Namespace, method: str, output: Path, count: int) -> None:
    model = arguments.model
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(count)] if count > 1 else []
    command = [
        sys.executable, *launch, "-m", "expunge", "run", str(model),
        "--forget", str(model / "forget.jsonl"), "--retain", str(model / "retain.jsonl"),
        "--method", method, "--max-steps", str(arguments.steps), "--batch-size", "16",
        "--select", "last", "--device", "cpu", "--quiet", "--output", str(output),
    ]  # fmt: skip
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def _last(path: Path) -> dict[str, Any]:
    """The last step's loss and the median time of a step, the first left out."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {
        "loss": steps[-1]["loss"],
        "median": statistics.median(line["seconds"] for line in steps[1:]),
    }


def _apart(model: Path, one: Path, two: Path) -> float:
    """Largest relative difference of a tensor's change."""
    from safetensors.torch import load_file

    before, a, b = (load_file(path / "model.safetensors") for path in (model, one, two))
    return max(
        float((a[name].float() - b[name].float()).norm() / change)
        for name in before
        if (change := (a[name].float() - before[name].float()).norm()) > 0
    )


if __name__ == "__main__":
    main()
