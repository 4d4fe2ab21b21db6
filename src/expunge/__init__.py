"""Expunge removes what a language model has memorised and measures how far it got.

The names below are loaded when first used, so that importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from expunge.api import evaluate, unlearn
    from expunge.errors import ExpungeError, InputError, RunError
    from expunge.methods.adaptive_rmu import AdaptiveRMU
    from expunge.methods.gradient_ascent import GradientAscent
    from expunge.methods.gradient_difference import GradientDifference
    from expunge.methods.kl_minimization import KLMinimization
    from expunge.methods.libu import LIBU
    from expunge.methods.npo import NPO
    from expunge.methods.rmu import RMU
    from expunge.methods.simnpo import SimNPO
    from expunge.methods.spectral import Spectral

_HOMES = {
    "unlearn": "expunge.api",
    "evaluate": "expunge.api",
    "ExpungeError": "expunge.errors",
    "InputError": "expunge.errors",
    "RunError": "expunge.errors",
    "AdaptiveRMU": "expunge.methods.adaptive_rmu",
    "GradientAscent": "expunge.methods.gradient_ascent",
    "GradientDifference": "expunge.methods.gradient_difference",
    "KLMinimization": "expunge.methods.kl_minimization",
    "LIBU": "expunge.methods.libu",
    "NPO": "expunge.methods.npo",
    "RMU": "expunge.methods.rmu",
    "SimNPO": "expunge.methods.simnpo",
    "Spectral": "expunge.methods.spectral",
}

__all__ = [
    "LIBU",
    "NPO",
    "RMU",
    "AdaptiveRMU",
    "ExpungeError",
    "GradientAscent",
    "GradientDifference",
    "InputError",
    "KLMinimization",
    "RunError",
    "SimNPO",
    "Spectral",
    "evaluate",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")
