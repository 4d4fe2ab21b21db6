"""Every attack by name, in the order in which they run: those that alter the weights come last."""

from __future__ import annotations

from collections.abc import Mapping

from expunge.audits.attacks import (
    ablation,
    benign,
    depth,
    direct,
    latent,
    membership,
    paraphrase,
    quantize,
    relearn,
    sampling,
    trigger,
    verbatim,
)
from expunge.audits.base import Attack

ATTACKS: Mapping[str, Attack] = {
    attack.name: attack
    for attack in (
        direct.ATTACK,
        paraphrase.ATTACK,
        sampling.ATTACK,
        verbatim.ATTACK,
        membership.ATTACK,
        ablation.ATTACK,
        trigger.ATTACK,
        latent.ATTACK,
        depth.ATTACK,
        quantize.ATTACK,
        relearn.ATTACK,
        benign.ATTACK,
    )
}
