"""Direction ablation: one direction removed from every layer's output, the facts asked again.

Methods that steer hidden states leave one direction that tells forget text from other text; without it
the knowledge can be there again. Difference of means as in Lucki et al., arXiv 2409.18025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Reader, Subject
from expunge.data.batches import PAD_ID, in_order
from expunge.data.rows import Row
from expunge.data.tokenization import encode_rows
from expunge.models.decoder import DecoderLayout, every_layer, forward_hook, states_of, with_states
from expunge.models.kernels import fast_products
from expunge.models.rope import switch_of


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of every fact without the direction of some layers, one layer's at a time."""
    reader, layout = subject.reader, subject.checked.layout
    forget, retain = (mean_states(reader, layout, rows) for rows in (case.facts, case.retain))
    layers = spaced(layout.count, case.budget.layers)
    scores, texts, lengths = {}, {}, {}
    for number, layer in enumerate(layers):
        difference = forget[layer] - retain[layer]
        lengths[f"layer {layer}"] = round(float(difference.norm() / retain[layer].norm()), 4)
        direction = difference / difference.norm().clamp(min=1e-12)
        with ablated(reader.model, layout, direction, retain):
            answers = reader.direct(case.facts)
        variant = f"layer {layer}"
        scores[variant], texts[variant] = answers.scores, answers.texts
        advance(number + 1, len(layers))
    return Found(scores, texts=texts, numbers={"relative_length": lengths})


def spaced(count: int, most: int | None) -> list[int]:
    """`most` of the layers 0 to count - 1, evenly spaced, the last among them; None is all."""
    if most is None or most >= count:
        return list(range(count))
    return [round((number + 1) * count / most) - 1 for number in range(most)]


def without_direction(
    states: torch.Tensor, direction: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
    """`states` (..., width) whose component along the unit `direction` is that of `reference` (width,).

    With the retain rows' mean as reference, retain text stays near where it was; a component of 0
    would move it too.
    """
    direction = direction.to(states.dtype)
    excess = (states - reference.to(states.dtype)) @ direction
    return states - excess[..., None] * direction


@contextmanager
def ablated(
    model: nn.Module, layout: DecoderLayout, direction: torch.Tensor, references: torch.Tensor
) -> Iterator[None]:
    """In the body every layer's output loses `direction` (width,); references (layers, width)."""

    def hook_of(layer: int) -> Callable[..., object]:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> object:
            states = without_direction(states_of(output), direction, references[layer])
            return with_states(output, states)

        return hook

    with ExitStack() as stack:
        for layer in range(layout.count):
            stack.enter_context(forward_hook(layout.layer(model, layer), hook_of(layer)))
        yield


@torch.no_grad()
def mean_states(reader: Reader, layout: DecoderLayout, rows: Sequence[Row]) -> torch.Tensor:
    """The mean output of every layer over the counted tokens of the rows: (layers, width), float32."""
    examples = encode_rows(rows, reader.tokenizer, reader.policy, eos=False)
    model, sums, count = reader.model, None, 0
    switch = switch_of(model.config)
    batches = in_order(examples, reader.batch_size, PAD_ID)
    sides = (side for whole in batches for side in whole.split([n > switch for n in whole.lengths]))
    for cpu_batch in filter(None, sides):
        batch = cpu_batch.to(model.device)
        with fast_products(model.dtype, model.device):
            states = layer_outputs(model, layout, batch.input_ids)
        chosen = torch.stack([state[batch.token_mask].float().sum(0) for state in states])
        sums = chosen if sums is None else sums + chosen
        count += int(batch.token_mask.sum())
    assert sums is not None  # a row set holds at least one row
    return sums / count


def layer_outputs(
    model: nn.Module, layout: DecoderLayout, input_ids: torch.Tensor
) -> list[torch.Tensor]:
    """Every layer's output for right-padded ids (rows, tokens): each (rows, tokens, width)."""
    with every_layer(model, layout) as caught:
        # Padding on the right needs no mask, for no token looks ahead.
        model(input_ids=input_ids, use_cache=False, **_one_logit(model))
    return caught


def _one_logit(model: nn.Module) -> dict[str, Any]:
    """The argument by which a model unembeds its last token only, where it has one."""
    import inspect

    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


ATTACK = Attack(
    name="ablate",
    title="Direction ablation",
    kind="extraction",
    reference="arXiv 2409.18025",
    how="with one direction of the hidden states removed",
    run=run,
)
