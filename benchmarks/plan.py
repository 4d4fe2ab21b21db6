"""What `expunge plan` says a run takes against what it then takes: peak resident memory.

Each method is planned and then run for a step or two in a process of its own, whose peak the system
tells when it ends: on a model of `expunge benchmark prepare`, and on a random one of 12 layers. With
--geometry nothing runs: it prints the plans of models of published size on GPUs by name, from a
directory whose weights are a hole in a file.

    python benchmarks/plan.py --rows-dir ROWS --tokenizer ../shared/models/lume-mini --benchmark DIR
    python benchmarks/plan.py --rows-dir ROWS --tokenizer ... --geometry llama-1b llama-8b
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
    key_value_heads: int
    vocabulary: int
    tied: bool


GEOMETRIES = {
    "llama-1b": Geometry(16, 2048, 8192, 32, 8, 128256, True),
    "llama-8b": Geometry(32, 4096, 14336, 32, 8, 128256, False),
}
MEASURED = Geometry(12, 512, 2048, 8, 8, 50304, False)
CONFIGURATIONS = {
    "spectral": ("float32", "--method spectral --method.random_rows 16"),
    "libu": ("float32", "--method libu --method.random_rows 16"),
    "adaptive-rmu": ("float32", "--method adaptive-rmu --method.random_rows 16"),
    "gradient-difference": ("float32", "--method gradient-difference"),
    "spectral, micro-batches of 2": (
        "float32",
        "--method spectral --method.random_rows 16 --micro-batch-size 2",
    ),
    "spectral, in bfloat16": ("bfloat16", "--method spectral --method.random_rows 16"),
}
"""Dtype of the run and its options; the model's files have the same dtype."""
ON_BENCHMARK = ("spectral", "libu", "adaptive-rmu", "gradient-difference")
PLANS = (
    "",
    "--method.gradient_checkpointing",
    "--sharded 2",
    "--sharded 2 --method.gradient_checkpointing",
    "--sharded 8",
    "--method libu",
    "--method libu --method.gradient_checkpointing",
    "--method adaptive-rmu",
)


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
        f"Machine: {describe_machine(arguments.threads)}.",
        "",
        "| model | run | largest phase | planned, MiB | measured, MiB | planned / measured | plan, s |",
        "|---|---|---|---|---|---|---|",
    )
    ratios = []
    for model, name, options in _runs(arguments, scratch):
        options = [*options, "--device", "cpu"]
        started = time.monotonic()
        planned = _planned(options, arguments.threads)
        seconds = time.monotonic() - started
        peaks = [
            _peak_of_run(options, scratch / "out", arguments.threads) for _ in range(arguments.rounds)
        ]
        measured = statistics.median(peaks)
        ratios.append(planned["peak_bytes"] / measured)
        _say(
            lines,
            f"| {model} | {name} | {planned['peak_phase']} | {planned['peak_bytes'] / 2**20:.0f} |"
            f" {measured / 2**20:.0f} | {ratios[-1]:.2f} | {seconds:.0f} |",
        )
    worst = max(abs(ratio - 1) for ratio in ratios)
    _say(lines, "", f"Furthest from what was measured: {100 * worst:.0f}%; the aim is 20%.")
    return lines


def _runs(arguments: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Model, run and options, of every run to plan and to measure."""
    if arguments.benchmark:
        home = Path(arguments.benchmark)
        for name in ON_BENCHMARK:
            yield (
                "built-in",
                name,
                [
                    str(home / "target"), "--forget", str(home / "forget.jsonl"),
                    "--retain", str(home / "retain.jsonl"),
                    "--nonmembers", str(home / "calibration.jsonl"),
                    "--max-steps", "2", "--method", name,
                ],
            )  # fmt: skip
    for side in ("forget", "retain"):
        _write_rows(arguments.rows_dir, side, arguments.rows, scratch / f"{side}.jsonl")
    for name in arguments.only or CONFIGURATIONS:
        dtype, options = CONFIGURATIONS[name]
        if not (scratch / dtype).exists():
            _make_model(dtype, arguments.tokenizer, scratch / dtype)
        yield (
            f"{MEASURED.layers} x {MEASURED.width}",
            name,
            [
                str(scratch / dtype), "--forget", str(scratch), "--retain", str(scratch),
                "--dtype", dtype, "--batch-size", str(arguments.batch_size),
                "--max-steps", str(arguments.max_steps), *options.split(),
            ],
        )  # fmt: skip


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
    _say(
        lines,
        "Computed, not measured; bfloat16, h100-80, default batch sizes. In GiB, of one GPU.",
        "",
        "| model | run | fits | largest phase | GPU | " + " | ".join(_SHOWN) + " | other |",
        "|" + "---|" * (6 + len(_SHOWN)),
    )
    for name in arguments.geometry:
        directory = scratch / name
        _make_hollow_model(GEOMETRIES[name], arguments.tokenizer, directory)
        rows = ["--forget", arguments.rows_dir, "--retain", arguments.rows_dir]
        for options in PLANS:
            given = [str(directory), *rows, "--dtype", "bfloat16", "--on", "h100-80"]
            plan = _planned([*given, *options.split()], arguments.threads)
            parts = next(p["parts"] for p in plan["phases"] if p["name"] == plan["peak_phase"])
            shown = [sum(parts.get(kind, 0) for kind in kinds) for kinds in _SHOWN.values()]
            cells = [
                name,
                f"{plan['method']} `{options}`" if options else plan["method"],
                "yes" if plan["fits"] else "no",
                plan["peak_phase"],
                f"**{_gib(plan['peak_bytes'])}**",
                *map(_gib, shown),
                _gib(plan["peak_bytes"] - sum(shown)),
            ]
            _say(lines, "| " + " | ".join(cells) + " |")
    return lines


_SHOWN = {
    "weights": ("weights", "trained weights, float32"),
    "gradients and optimiser": ("gradients", "optimiser state"),
    "casts": ("trained weights, cast for products",),
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
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.width,
        intermediate_size=geometry.inner,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=geometry.tied,
        architectures=["LlamaForCausalLM"],
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


_MAKE = """
import sys
sys.path.insert(0, sys.argv[1])
from plan import make_model
make_model(*sys.argv[2:])
"""


def _make_model(dtype: str, tokenizer: str, directory: Path) -> None:
    """In a process of its own, whose memory a later fork would inherit as its peak."""
    here = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, "-c", _MAKE, here, dtype, tokenizer, str(directory)],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def make_model(dtype: str, tokenizer: str, directory: str) -> None:
    """A model of random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(MEASURED)).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)


def _make_hollow_model(geometry: Geometry, tokenizer: str, directory: Path) -> None:
    """Configuration, tokenizer and a safetensors file of the right size that holds no block."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    config = _config(geometry)
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
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
    parser.add_argument("--geometry", nargs="+", choices=tuple(GEOMETRIES), help="plan, run nothing")
    parser.add_argument("--only", nargs="+", choices=tuple(CONFIGURATIONS))
    parser.add_argument("--benchmark", help="a directory of `expunge benchmark prepare`")
    parser.add_argument("--rows", type=int, default=16, help="rows a side of the random model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scratch", help="directory for the models and results")
    parser.add_argument("--output", help="write the table here")
    return parser


if __name__ == "__main__":
    main()
