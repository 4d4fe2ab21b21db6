"""What `expunge plan` says a run takes against what it then takes: peak resident memory.

Each configuration is planned and then run for a few steps in a process of its own, whose peak the
system tells when it ends. With --geometry nothing runs: it prints the plans of models of published
size on GPUs by name, from a directory whose weights are a hole in a file.

    python benchmarks/plan.py --rows-dir ../shared/lume --tokenizer ../shared/models/lume-mini
    python benchmarks/plan.py --rows-dir ... --tokenizer ... --geometry olmo-7b
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """A published model's size."""

    layers: int
    width: int
    inner: int
    heads: int


GEOMETRIES = {"olmo-1b": Geometry(16, 2048, 8192, 16), "olmo-7b": Geometry(32, 4096, 11008, 32)}
VOCABULARY = 50304
CONFIGURATIONS = {
    "adaptive-rmu, select last": ("float32", "--select last"),
    "adaptive-rmu, select best": ("float32", "--select best"),
    "adaptive-rmu, select last, in bfloat16": ("bfloat16", "--select last"),
    "adaptive-rmu, select best, in bfloat16": ("bfloat16", "--select best"),
    "libu": ("float32", "--method libu"),
    "libu, in bfloat16": ("bfloat16", "--method libu"),
    "npo": ("float32", "--method npo"),
    "npo, micro-batches of 1": ("float32", "--method npo --micro-batch-size 1"),
    "npo, all weights": ("float32", "--method npo --method.parameters full"),
}
"""Dtype of the run and its options; the model's files have the same dtype."""
PLANS = {
    "olmo-1b": (
        ("h100-80", "--method.layer 13"),
        ("h100-80", "--method libu"),
        ("24GB", "--method.layer 7 --select last"),
        ("24GB", "--method libu --method.gradient_checkpointing --micro-batch-size 4"),
    ),
    "olmo-7b": (
        ("h100-80", "--method.layer 26"),
        ("h100-80", "--method libu"),
        ("h100-80", "--method libu --method.gradient_checkpointing"),
        ("24GB", "--method.layer 7 --select last"),
        ("24GB", "--method.layer 26 --select last"),
    ),
}


def main() -> None:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        lines = (
            _published(arguments, Path(scratch))
            if arguments.geometry
            else _measured(arguments, Path(scratch))
        )
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _measured(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    from machine import describe_machine

    lines: list[str] = []
    _say(
        lines,
        f"Machine: {describe_machine(arguments.threads)}. OLMo architecture, {arguments.layers}"
        f" layers, width {arguments.width}, vocabulary {VOCABULARY}; {arguments.rows} LUME rows a"
        f" side, batch {arguments.batch_size}, {arguments.max_steps} steps; medians of"
        f" {arguments.rounds} rounds.",
        "",
        "| run | largest phase | planned, MiB | measured, MiB | planned / measured |",
        "|---|---|---|---|---|",
    )
    for side in ("forget", "retain"):
        _write_rows(arguments.rows_dir, side, arguments.rows, scratch / f"{side}.jsonl")
    models: dict[str, Path] = {}
    ratios = []
    for name in arguments.only or CONFIGURATIONS:
        dtype, options = CONFIGURATIONS[name]
        if dtype not in models:
            models[dtype] = scratch / dtype
            width = arguments.width
            geometry = Geometry(arguments.layers, width, 4 * width, max(1, width // 64))
            _make_model(geometry, dtype, arguments.tokenizer, models[dtype])
        common = [
            str(models[dtype]), "--forget", str(scratch), "--retain", str(scratch),
            "--dtype", dtype, "--device", "cpu", "--batch-size", str(arguments.batch_size),
            "--max-steps", str(arguments.max_steps), *options.split(),
        ]  # fmt: skip
        planned = _planned(common, arguments.threads)
        peaks = [
            _peak_of_run(common, scratch / "out", arguments.threads)
            for _ in range(arguments.rounds)
        ]
        measured = statistics.median(peaks)
        ratios.append(planned["peak_bytes"] / measured)
        _say(
            lines,
            f"| {name} | {planned['peak_phase']} | {planned['peak_bytes'] / 2**20:.0f} |"
            f" {measured / 2**20:.0f} | {ratios[-1]:.2f} |",
        )
    worst = max(abs(ratio - 1) for ratio in ratios)
    _say(lines, "", f"Furthest from what was measured: {100 * worst:.0f}%; the aim is 15%.")
    return lines


def _planned(options: Sequence[str], threads: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "expunge", "plan", *options, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def _peak_of_run(options: Sequence[str], output: Path, threads: int) -> int:
    """Peak resident memory of one run, in bytes."""
    command = [
        sys.executable, "-m", "expunge", "run", *options, "--output", str(output), "--overwrite",
        "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the run failed: {' '.join(command)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _published(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    lines: list[str] = []
    for name in arguments.geometry:
        geometry = GEOMETRIES[name]
        directory = scratch / name
        _make_hollow_model(geometry, arguments.tokenizer, directory)
        _say(
            lines,
            "",
            f"Computed, not measured: {name} ({geometry.layers} layers, width {geometry.width},"
            f" MLP {geometry.inner}, {geometry.heads} heads, vocabulary {VOCABULARY}), bfloat16,"
            f" rows of {arguments.rows_dir}, default batch sizes.",
            "",
            "| run | budget | fits | largest phase | GPU, GiB | " + " | ".join(_SHOWN) + " | other,"
            " GiB | CPU memory, GiB | cache on disk, GiB | steps |",
            "|" + "---|" * (10 + len(_SHOWN) - 1),
        )
        for budget, options in PLANS[name]:
            plan = _planned(
                [
                    str(directory),
                    "--forget",
                    arguments.rows_dir,
                    "--retain",
                    arguments.rows_dir,
                    "--dtype",
                    "bfloat16",
                    "--on",
                    budget,
                    *options.split(),
                ],
                arguments.threads,
            )
            parts = next(p["parts"] for p in plan["phases"] if p["name"] == plan["peak_phase"])
            shown = [sum(parts.get(kind, 0) for kind in kinds) for kinds in _SHOWN.values()]
            cells = [
                f"{plan['method']} `{options}`",
                f"{budget} ({_gib(plan['budget']['bytes'])})",
                "yes" if plan["fits"] else "no",
                plan["peak_phase"],
                f"**{_gib(plan['peak_bytes'])}**",
                *map(_gib, shown),
                _gib(plan["peak_bytes"] - sum(shown)),
                _gib(plan["cpu_peak_bytes"]),
                _gib(plan["cache_bytes"]),
                str(plan["steps"]),
            ]
            _say(lines, "| " + " | ".join(cells) + " |")
    return lines


_SHOWN = {
    "weights": ("weights", "trained weights, float32"),
    "gradients and optimiser": ("gradients", "optimiser state"),
    "activations": ("activations and temporaries",),
    "logits": ("logits and their copies",),
}


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _say(lines: list[str], *more: str) -> None:
    lines.extend(more)
    sys.stdout.write("".join(f"{line}\n" for line in more))
    sys.stdout.flush()


def _write_rows(directory: str, side: str, count: int, path: Path) -> None:
    from expunge.data.rows import read_rows

    rows = list(read_rows(directory, side))  # type: ignore[arg-type]
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    with path.open("w", encoding="utf-8") as file:
        for row in chosen:
            fields = {"id": row.id, "input": row.input, "output": row.output, "task": row.task}
            file.write(json.dumps(fields) + "\n")


def _config(geometry: Geometry) -> Any:
    from transformers import OlmoConfig

    return OlmoConfig(
        vocab_size=VOCABULARY,
        hidden_size=geometry.width,
        intermediate_size=geometry.inner,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=1,
    )


_MAKE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from plan import Geometry, make_model
make_model(Geometry(*map(int, sys.argv[2:6])), *sys.argv[6:])
"""


def _make_model(geometry: Geometry, dtype: str, tokenizer: str, directory: Path) -> None:
    """In a process of its own, whose memory a later fork would inherit as its peak."""
    sizes = [
        str(size) for size in (geometry.layers, geometry.width, geometry.inner, geometry.heads)
    ]
    here = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, "-c", _MAKE, here, *sizes, dtype, tokenizer, str(directory)],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def make_model(geometry: Geometry, dtype: str, tokenizer: str, directory: str) -> None:
    """A model of random weights."""
    import torch
    from transformers import AutoTokenizer, OlmoForCausalLM

    torch.manual_seed(0)
    OlmoForCausalLM(_config(geometry)).to(getattr(torch, dtype)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)


def _make_hollow_model(geometry: Geometry, tokenizer: str, directory: Path) -> None:
    """Configuration, tokenizer and a safetensors file of the right size that holds no block."""
    import torch
    from transformers import AutoTokenizer, OlmoForCausalLM

    config = _config(geometry)
    config.architectures = ["OlmoForCausalLM"]
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    with torch.device("meta"):
        model = OlmoForCausalLM(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        shape = list(parameter.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows-dir", required=True, help="a directory with forget.* and retain.*")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument(
        "--geometry", nargs="+", choices=tuple(GEOMETRIES), help="plan, run nothing"
    )
    parser.add_argument("--only", nargs="+", choices=tuple(CONFIGURATIONS))
    parser.add_argument("--rows", type=int, default=48, help="rows a side")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scratch", help="directory for the models and results")
    parser.add_argument("--output", help="write the table here")
    return parser


if __name__ == "__main__":
    main()
