"""Muon in float64, so that sums in another order stay rounding; as a script, the command with it.

Its Newton-Schulz iterations are in bfloat16, where the last digit of a float32 gradient decides the
third of an update.
"""

from __future__ import annotations

from typing import Any

import torch

ITERATIONS = "torch.optim._muon._zeropower_via_newtonschulz"


def zeropower(
    gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """As PyTorch's own, in another precision."""
    a, b, c = coefficients
    is_tall = len(gradient) > len(gradient.T)
    matrix = (gradient.T if is_tall else gradient).double()
    matrix = matrix / matrix.norm().clamp(min=eps)
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return (matrix.T if is_tall else matrix).to(gradient)


def main() -> Any:
    """The command."""
    from expunge.cli.main import entry

    module: Any = torch.optim._muon
    module._zeropower_via_newtonschulz = zeropower
    return entry()


if __name__ == "__main__":
    main()
