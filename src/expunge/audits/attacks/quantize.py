"""Quantisation: the weights rounded to int8 and int4, the facts asked again. arXiv 2410.16454.

A small change of the weights can vanish in the rounding, and with it the unlearning.
"""

from __future__ import annotations

import torch
from torch import nn

from expunge.audits.attacks.rounding import rounded
from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Subject
from expunge.models.decoder import DecoderLayout, is_turned

SCHEMES: dict[str, tuple[int, int | None]] = {"int8": (8, None), "int4": (4, 128)}
"""Bits, and inputs that share a scale (None: one scale an output channel)."""


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of forget and retain rows with the linear maps of every layer rounded."""
    scores, control, texts = {}, {}, {}
    for number, (scheme, (bits, group)) in enumerate(SCHEMES.items()):
        with subject.altered() as reader:
            round_weights(reader.model, subject.checked.layout, bits, group)
            answers = reader.direct(case.facts)
            scores[scheme], texts[scheme] = answers.scores, answers.texts
            control[scheme] = reader.direct(case.retain).scores
        advance(number + 1, len(SCHEMES))
    return Found(scores, control=control, texts=texts)


@torch.no_grad()
def round_weights(model: nn.Module, layout: DecoderLayout, bits: int, group: int | None) -> None:
    """Rounds the weight of every linear map in the layers, in place; embeddings and head stay."""
    for name in layout.linears():
        module = model.get_submodule(name)
        weight: torch.Tensor = module.get_parameter("weight")
        if is_turned(module):
            weight = weight.T
        weight.copy_(rounded(weight, bits, group))


ATTACK = Attack(
    name="quantize",
    title="Quantisation",
    kind="extraction",
    reference="arXiv 2410.16454",
    how="with weights rounded to int8 or int4",
    run=run,
)
