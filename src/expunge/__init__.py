"""Expunge removes what a language model has memorised and measures how far it got.

The names below are loaded when first used, so that importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from expunge.api import audit, compare, evaluate, report, unlearn
    from expunge.errors import ExpungeError, InputError, RunError
    from expunge.methods.adaptive_rmu import AdaptiveRMU
    from expunge.methods.alt_po import AltPO
    from expunge.methods.chunked_gradient_difference import ChunkedGradientDifference
    from expunge.methods.gradient_ascent import GradientAscent
    from expunge.methods.gradient_difference import GradientDifference
    from expunge.methods.idk_dpo import IDKDPO
    from expunge.methods.jensun import JensUn
    from expunge.methods.kl_minimization import KLMinimization
    from expunge.methods.libu import LIBU
    from expunge.methods.libu_published import PublishedLIBU
    from expunge.methods.localized_gradient_difference import LocalizedGradientDifference
    from expunge.methods.npo import NPO
    from expunge.methods.npo_merging import NPOMerging
    from expunge.methods.rep_select import RepSelect
    from expunge.methods.retrain import Retrain
    from expunge.methods.rmu import RMU
    from expunge.methods.sam_npo import SamNPO
    from expunge.methods.satimp import SatImp
    from expunge.methods.simnpo import SimNPO
    from expunge.methods.spectral import Spectral
    from expunge.methods.token_npo import TokenNPO
    from expunge.methods.undial import UNDIAL
    from expunge.methods.wga import WGA

__all__ = [
    "IDKDPO",
    "LIBU",
    "NPO",
    "RMU",
    "UNDIAL",
    "WGA",
    "AdaptiveRMU",
    "AltPO",
    "ChunkedGradientDifference",
    "ExpungeError",
    "GradientAscent",
    "GradientDifference",
    "InputError",
    "JensUn",
    "KLMinimization",
    "LocalizedGradientDifference",
    "NPOMerging",
    "PublishedLIBU",
    "RepSelect",
    "Retrain",
    "RunError",
    "SamNPO",
    "SatImp",
    "SimNPO",
    "Spectral",
    "TokenNPO",
    "audit",
    "compare",
    "evaluate",
    "report",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'expunge' has no attribute {name!r}")
    if name.islower():
        home = "expunge.api"
    else:
        home = "expunge.errors" if name.endswith("Error") else "expunge.methods.catalog"
    return getattr(import_module(home), name)
