"""A model whose weights do not fit the memory that the process may have is unlearned all the same.

Makes an OLMo of random weights, sets the limit on address space (`ulimit -v`) below the size of its
files, shows that loading it under that limit fails, and runs `expunge run` at an early layer under it.

    python benchmarks/memory_limit.py --rows-dir ../shared/lume --tokenizer ../shared/models/lume-mini
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

_LOAD = """
import sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows-dir", required=True, help="a directory with forget.* and retain.*")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=16, help="rows a side")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--limit", type=float, default=0.8, help="limit, in sizes of the model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", help="directory for the model and the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        _compare(arguments, Path(scratch))


def _compare(arguments: argparse.Namespace, scratch: Path) -> None:
    from machine import describe_machine

    model = scratch / "model"
    _in_a_process_of_its_own(arguments, model)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    limit = int(arguments.limit * size)
    _write_rows(arguments.rows_dir, "forget", arguments.rows, scratch / "forget.jsonl")
    _write_rows(arguments.rows_dir, "retain", arguments.rows, scratch / "retain.jsonl")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    loading = subprocess.run(
        [sys.executable, "-c", _LOAD, str(model)],
        preexec_fn=limited,
        env=environment,
        capture_output=True,
        text=True,
    )
    command = [
        sys.executable, "-m", "expunge", "run", str(model), "--dtype", "bfloat16",
        "--forget", str(scratch / "forget.jsonl"), "--retain", str(scratch / "retain.jsonl"),
        "--method.layer", str(arguments.layer), "--select", "last", "--epochs", "1",
        "--batch-size", "8", "--unknown-rows", "unlearn", "--output", str(scratch / "out"),
    ]  # fmt: skip
    subprocess.run(command, preexec_fn=limited, env=environment, check=True)
    manifest = json.loads((scratch / "out" / "expunge.json").read_text(encoding="utf-8"))
    peak = manifest["peak_memory_bytes"]["process"]
    sys.stdout.write(
        f"Machine: {describe_machine(arguments.threads)}.\n"
        f"weights {size / 2**30:.2f} GiB; limit on address space {limit / 2**30:.2f} GiB\n"
        f"from_pretrained under the limit: "
        f"{'loaded' if loading.returncode == 0 else _last_line(loading.stderr)}\n"
        f"expunge run, layer {arguments.layer} of {arguments.layers}: done, {manifest['steps']} steps,"
        f" {len(manifest['changed_tensors'])} tensors changed, peak memory {peak / 2**30:.2f} GiB,"
        f" {manifest['seconds']['total']:.0f} s\n"
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines() or ["ended without a word"]
    return f"failed ({lines[-1][:120]})"


def _write_rows(directory: str, side: Literal["forget", "retain"], count: int, path: Path) -> None:
    from expunge.data.rows import read_rows

    rows = list(read_rows(directory, side))
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    path.write_text(
        "".join(
            json.dumps({"id": row.id, "input": row.input, "output": row.output, "task": row.task}) + "\n"
            for row in chosen
        ),
        encoding="utf-8",
    )


def _in_a_process_of_its_own(arguments: argparse.Namespace, directory: Path) -> None:
    """Makes the model where its memory is given back afterwards."""
    pid = os.fork()
    if pid == 0:
        try:
            _make_model(arguments, directory)
        except BaseException as error:  # the child must not go on as the parent
            sys.stderr.write(f"{error}\n")
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the model could not be made")


def _make_model(arguments: argparse.Namespace, directory: Path) -> None:
    import torch
    from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 128,
        max_position_embeddings=2048,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.set_default_dtype(torch.bfloat16)
    OlmoForCausalLM(config).save_pretrained(directory, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(directory)


if __name__ == "__main__":
    main()
