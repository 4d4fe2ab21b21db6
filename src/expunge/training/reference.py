"""What a run compares its forget rows with, if a model says it: the base, or the target itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from expunge.methods.base import Context
from expunge.models.decoder import DecoderLayout
from expunge.models.kernels import autocast_of, fast_products
from expunge.processes import OneProcess, Processes
from expunge.training.preparation import Prepared
from expunge.training.progress import Progress
from expunge.training.validation import asked_before, asked_otherwise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_base(
    prepared: Prepared,
    base: PreTrainedModel,
    layout: DecoderLayout,
    progress: Progress,
    processes: Processes | None = None,
) -> Prepared:
    """The run with what the base says of the forget rows, if these are its reference."""
    if prepared.yardstick != "base":
        return prepared
    progress.phase("asking the base", 0, 1)
    device = next(base.parameters()).device
    context = Context(
        model=base,
        layout=layout,
        forget=(),
        retain=(),
        pad_id=prepared.pad_id,
        batch_size=prepared.used.batch_size,
        seed=prepared.options.seed,
        device=device,
        autocast=autocast_of(device, base.dtype),
        progress=progress.phase,
        processes=processes or OneProcess(),
    )
    with fast_products(base.dtype, device):
        validation = asked_before(
            context, prepared.validation, [row for row in prepared.retain if row.listed]
        )
    progress.phase("asking the base", 1, 1)
    plain = prepared.plain and with_base(prepared.plain, base, layout, progress, processes)
    return replace(prepared, validation=validation, plain=plain)


def with_counterfactuals(prepared: Prepared, context: Context) -> tuple[Prepared, list[str]]:
    """The run with what the target says of counterfactuals, if these are its reference, and warnings."""
    if prepared.yardstick != "counterfactuals":
        return prepared, []
    validation = asked_otherwise(context, prepared.validation, prepared.counterfactuals)
    if validation is not None:
        return replace(prepared, validation=validation), []
    nothing = replace(prepared.validation, members=())
    return replace(prepared, validation=nothing, counterfactuals=()), [
        "forget rows hold too few names and numbers to exchange, so nothing says how far to go;"
        " give non-members"
    ]
