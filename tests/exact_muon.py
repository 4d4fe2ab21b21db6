"""Muon in float64, so that sums in another order stay rounding; as a script, commands with it.

The script takes one command after another, with THEN between them: their processes start once. It is
asked to stop in the step that STOP_AT names.

Its products are in bfloat16, where the last digit of a float32 gradient decides the
third of an update.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from expunge.training import muon

PRODUCTS = "expunge.training.muon._PRODUCTS"
THEN = "then"


def stop_at(last: int) -> None:
    """Sends this process SIGTERM in the middle of a step."""
    from expunge.training.loop import Loop

    original = Loop._step

    def stepping(self: Loop, step: int, started: float) -> str | None:
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, started)

    Loop._step = stepping  # type: ignore[method-assign]


def main() -> Any:
    """Commands, the last as who starts it has it; ends at the first that fails."""
    from expunge.cli.main import entry
    from expunge.cli.main import main as command

    muon._PRODUCTS = torch.float64
    if "STOP_AT" in os.environ:
        stop_at(int(os.environ["STOP_AT"]))
    words = sys.argv[1:]
    while THEN in words:
        place = words.index(THEN)
        if code := command(words[:place]):
            # As at the end of `entry`; the launcher ends the others.
            os._exit(code)
        words = words[place + 1 :]
    sys.argv[1:] = words
    return entry()


if __name__ == "__main__":
    main()
