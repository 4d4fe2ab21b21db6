"""Sizes of a run, for its plan: of the model, of what is trained in it, and of the largest batches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, TypeVar

from torch import nn

from expunge.data.batches import Batch, collate
from expunge.data.sampling import step_batches
from expunge.data.tokenization import Example
from expunge.methods.base import generator_of
from expunge.methods.gradient import GradientSettings
from expunge.methods.localized_gradient_difference import LocalizedGradientDifference
from expunge.methods.log_odds import LogOddsSettings
from expunge.methods.npo_merging import NPOMerging
from expunge.methods.preference import PreferenceSettings
from expunge.methods.spectral import Spectral
from expunge.models.decoder import DecoderLayout, map_sizes, skeleton_of
from expunge.models.kernels import is_narrow
from expunge.models.loading import CheckedModel
from expunge.training.micro_batches import micro_batches, part
from expunge.training.preparation import Prepared

Row = TypeVar("Row")
_EPOCHS = 10
"""Epochs whose steps are looked at; those of more would hardly be larger."""


@dataclass(frozen=True)
class Shapes:
    """Numbers of a model and of what a method trains in it."""

    layers: int
    layer: int
    """Numbers of one decoder layer, the mean of all."""
    outside: int
    """Numbers of all that is in no layer; tied ones once."""
    head: int
    """Numbers of the LM head."""
    flow: int
    """Numbers that the linear maps of one layer take and give of one token, the mean of all."""
    maps: Collection[Sequence[int]]
    """Shapes of the linear maps of the model and the adapter, each once."""
    width: int
    vocabulary: int
    trained: Sequence[int]
    """Numbers of each trained tensor."""
    changed: Sequence[int]
    """Numbers of each weight that the result changes."""
    white: int
    """Numbers of what makes the inputs of trained matrices white (`methods.whitening`)."""

    @property
    def numbers(self) -> int:
        """Of the whole model."""
        return self.layers * self.layer + self.outside

    def compiled(self, item: int) -> int:
        """How many maps have products that oneDNN keeps, for numbers of `item` bytes."""
        return sum(item < 4 or not is_narrow(shape) for shape in self.maps)


def shapes_of(checked: CheckedModel, method: Any) -> Shapes:
    """Those of the model and the method, from the configuration alone."""
    layout = checked.layout
    model = skeleton_of(checked.config, trust_remote_code=checked.trust_remote_code)
    maps = [map_sizes(model.get_submodule(name)) for name in layout.linears()]
    layers = model.get_submodule(layout.layers).parameters()
    layer = sum(p.numel() for p in layers) // layout.count
    weights = _trained_weights(method, model, layout)
    rank = getattr(method, "rank", 0) if method.has_adapter else 0
    trained = [p.numel() for p in weights]
    inputs = [
        map_sizes(model.get_submodule(name))[1]
        for name in (layout.linears(method.targets) if _is_whitened(method) else ())
    ]
    head = (model.get_output_embeddings() or model.get_input_embeddings()).weight
    kinds = {*maps, tuple(head.shape)}
    if rank:
        kinds |= {(rank, p.shape[1]) for p in weights} | {(p.shape[0], rank) for p in weights}
        sides = 2 if isinstance(method, NPOMerging) else 1
        trained = [rank * size for p in weights for size in p.shape] * sides
    return Shapes(
        layers=layout.count,
        layer=layer,
        outside=sum(p.numel() for p in model.parameters()) - layout.count * layer,
        head=head.numel(),
        flow=sum(map(sum, maps)) // layout.count,
        maps=kinds,
        width=layout.width,
        vocabulary=checked.config.get_text_config().vocab_size,
        trained=trained,
        changed=[p.numel() for p in weights],
        white=sum(size**2 for size in inputs if size <= layout.width),
    )


def _is_whitened(method: Any) -> bool:
    """Whether the method steps in coordinates of its own."""
    return isinstance(method, Spectral) and method.damping is not None


def _trained_weights(method: Any, model: Any, layout: DecoderLayout) -> list[nn.Parameter]:
    """The weights that are trained, or that an adapter is put on."""
    segment = method.trained_layers(layout)
    if segment is not None:
        names = [layout.mlp_output_weight(i) for i in range(segment[0], segment[1] + 1)]
        return [model.get_parameter(name) for name in names]
    layers = None
    if hasattr(method, "layers_in"):
        layers = method.layers_in(layout)
    elif isinstance(method, LocalizedGradientDifference):
        layers = range(method.count_in(layout))
    full = isinstance(method, GradientSettings) and not method.has_adapter
    if not full or isinstance(method, LocalizedGradientDifference):
        names = layout.linears(method.targets, layers)
        return [model.get_submodule(name).weight for name in names]
    if layers is None:
        return list(model.parameters())
    return [p for index in layers for p in layout.layer(model, index).parameters()]


@dataclass(frozen=True)
class Largest:
    """The largest pass of any step."""

    batches: Sequence[Batch]
    """What it takes of each kind of rows: forget, the user's retain rows, those that no set lists."""
    accumulates: bool
    """Whether steps have several passes, so that gradients are there while one runs."""
    sizes: int
    """How many different sizes the passes of all steps have."""
    tokens: float
    """Of the rows of a step, without padding; the mean."""


def largest_batches(prepared: Prepared, pass_tokens: int | None, processes: int) -> Largest:
    """In the run's own order.

    `pass_tokens` are those of a packed pass; None where rows are padded. `processes` share a step.
    """
    used, packed = prepared.used, pass_tokens is not None
    forget, retain = step_batches(
        prepared.forget,
        prepared.retain if prepared.method.needs_retain else [],
        used.batch_size,
        prepared.pad_id,
        partial(generator_of, prepared.options.seed),
        prepared.method.sampling,
        used.steps,
        by_length=not packed,
    )
    best, accumulates, every = 0, False, 0
    steps = min(used.steps, _EPOCHS * used.steps_per_epoch)
    largest: list[list[Example]] = []
    sizes: set[tuple[int, int]] = set()
    for step in range(1, steps + 1):
        sides = [[prepared.forget[index] for index in forget.indices(step)]]
        if retain is not None:
            sides.append([prepared.retain[index] for index in retain.indices(step)])
        lengths = [[*map(len, side)] for side in sides]
        every += sum(map(sum, lengths))
        count = ceil(micro_batches(lengths, used.micro_batch_size, pass_tokens) / processes)
        accumulates |= count > 1
        count *= processes
        for index in range(count):
            first, *rest = [_cut(side, index, count) for side in sides]
            kinds = [first]
            if prepared.preferred and isinstance(prepared.method, PreferenceSettings | LogOddsSettings):
                mine = _cut(forget.indices(step), index, count)  # both outputs of a row at once
                pairs = ((prepared.preferred[row], prepared.forget[row]) for row in mine)
                kinds = [[*first, *(other for other, own in pairs if other is not own)]]
            for rows in rest:
                kinds += [[e for e in rows if e.listed is listed] for listed in (True, False)]
            tokens = [tokens_of(rows, packed=packed) for rows in kinds]
            if packed:
                sizes.add((1, sum(tokens)))
            else:
                sizes |= {(len(rows), size) for rows, size in zip(kinds, tokens, strict=True)}
            if sum(tokens) > best:
                best, largest = sum(tokens), kinds
    batches = [collate(rows, range(len(rows)), prepared.pad_id) for rows in largest if rows]
    return Largest(batches, accumulates, len(sizes), every / steps)


def _cut(rows: Sequence[Row], index: int, count: int) -> list[Row]:
    """The rows of part `index` of `count`; an idle one where there is none."""
    return list(rows[part(len(rows), index, count)] or rows[:1])


def tokens_of(examples: Sequence[Example], *, packed: bool) -> int:
    """Of one pass, with the padding that it has."""
    lengths = [len(example) for example in examples]
    return sum(lengths) if packed else len(lengths) * max(lengths, default=0)
