"""The methods by the name that the command line and the YAML files use."""

from __future__ import annotations

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

METHODS = {
    method.name: method
    for method in (
        Spectral,
        LIBU,
        AdaptiveRMU,
        PublishedLIBU,
        RMU,
        GradientAscent,
        GradientDifference,
        KLMinimization,
        NPO,
        SimNPO,
        TokenNPO,
        SamNPO,
        IDKDPO,
        AltPO,
        WGA,
        SatImp,
        UNDIAL,
        JensUn,
        NPOMerging,
        ChunkedGradientDifference,
        LocalizedGradientDifference,
        RepSelect,
        Retrain,
    )
}
