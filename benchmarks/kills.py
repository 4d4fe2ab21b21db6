"""SIGKILL at random moments of a run, resumed each time: the final weights against an unbroken run's.

    python benchmarks/kills.py --model ../shared/models/lume-mini --kills 20

Every moment is drawn from the whole length of what a run does, from its start to its last write, by a
seeded generator; the run is resumed after each kill until it has been killed so often and has ended.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WEIGHTS = "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a model with its rows beside it")
    parser.add_argument("--methods", nargs="+", default=["adaptive-rmu", "libu"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    from machine import describe_machine

    sys.stdout.write(f"Machine: {describe_machine(arguments.threads)}; seed {arguments.seed}.\n")
    for method in arguments.methods:
        with tempfile.TemporaryDirectory() as scratch:
            sys.stdout.write(_try(arguments, method, Path(scratch)) + "\n")
            sys.stdout.flush()


def _try(arguments: argparse.Namespace, method: str, scratch: Path) -> str:
    model = arguments.model
    command = [
        sys.executable, "-m", "expunge", "run", str(model),
        "--forget", str(model / "forget.jsonl"), "--retain", str(model / "retain.jsonl"),
        "--method", method, "--max-steps", str(arguments.steps), "--save-every", "2",
        "--validate-every", "6", "--select", "last", "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    started = time.monotonic()
    subprocess.run([*command, "--output", str(scratch / "whole")], env=environment, check=True)
    whole = time.monotonic() - started
    draw = random.Random(arguments.seed)
    out = scratch / "out"
    resumed = [*command, "--output", str(out), "--resume"]
    kills = ended = 0
    moments = []
    while kills < arguments.kills:
        process = subprocess.Popen(resumed, env=environment)
        moment = draw.uniform(0, whole)
        try:
            process.wait(timeout=moment)
            ended += 1  # it was complete before its moment: begin again, to be killed elsewhere
            _check(scratch)
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            moments.append(moment)
    subprocess.run(resumed, env=environment, check=True)
    _check(scratch)
    return (
        f"{method}: unbroken {whole:.0f} s; killed {kills} times, {min(moments):.1f} to"
        f" {max(moments):.1f} s after a start; ended {ended + 1} times, each with identical bytes"
    )


def _check(scratch: Path) -> None:
    digests = {
        hashlib.sha256((scratch / name / _WEIGHTS).read_bytes()).hexdigest() for name in ("whole", "out")
    }
    left = [path.name for path in scratch.iterdir() if path.name not in ("whole", "out")]
    if len(digests) != 1 or left:
        raise SystemExit(f"other bytes than the unbroken run's, or files left: {left}")


if __name__ == "__main__":
    main()
