"""Causal tracing: which layers' MLPs carry what a prompt says to the answer.

A prompt's embeddings are noised, which loses the answer. Then the MLP outputs of one layer, at the
prompt's tokens, are put back to what they were without noise; the share of the answer's probability that
returns is the layer's effect. Meng et al., arXiv 2202.05262, section 2, on whole prompts instead of the
subject's tokens, which rows do not mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from expunge.data.batches import Batch, in_order
from expunge.data.tokenization import Example
from expunge.maths.numerics import row_means, token_log_probs
from expunge.methods.base import Context
from expunge.methods.forward import all_logits
from expunge.models.decoder import forward_hook
from expunge.models.sharding import whole

Hook = Callable[..., torch.Tensor]


def layer_effects(
    context: Context, examples: Sequence[Example], noise: float, generator: torch.Generator
) -> list[float]:
    """How much of the answers' probability each layer's MLP brings back, from its restored outputs.

    Mean over examples of (restored - noised) / max(clean - noised, 0.01), each the geometric mean of
    the probabilities of an answer's tokens. `noise` is in standard deviations of the embeddings. An
    example without a prompt or an answer says nothing and is left out; the batch size changes nothing.
    """
    told = [e for e in examples if any(e.answer_mask[1:]) and not all(e.answer_mask[1:])]
    layers = range(context.layout.count)
    if not told:
        return [0.0 for _ in layers]
    embeddings = context.model.get_input_embeddings()
    scale = noise * float(whole(embeddings.weight.detach()).float().std())
    totals = torch.zeros(len(layers))
    done = 0
    for cpu_batch in in_order(told, context.batch_size, context.pad_id):
        draw = _noise(cpu_batch, context.model.config.get_text_config().hidden_size, generator)
        batch = cpu_batch.to(context.device)
        prompt = (batch.attention_mask.bool() & ~batch.answer_mask)[..., None]
        shift = draw.to(context.device) * scale * prompt
        outputs: dict[int, torch.Tensor] = {}
        with torch.no_grad(), context.autocast():
            with _caught(context, outputs):
                clean = _probabilities(context, batch)
            with forward_hook(embeddings, _added(shift)):
                noised = _probabilities(context, batch)
                for layer in layers:
                    put_back = _replaced(outputs[layer], prompt)
                    with forward_hook(_mlp(context, layer), put_back):
                        restored = _probabilities(context, batch)
                    share = (restored - noised) / (clean - noised).clamp(min=0.01)
                    totals[layer] += share.sum().cpu()
        done += len(batch.examples)
        context.progress("causal tracing", done, len(told))
    return [float(total) / len(told) for total in totals]


def best_window(effects: Sequence[float], size: int) -> range:
    """The `size` neighbouring layers with the largest summed effect; of equal ones the lowest."""
    starts = range(len(effects) - size + 1)
    first = max(starts, key=lambda start: (sum(effects[start : start + size]), -start))
    return range(first, first + size)


def _noise(batch: Batch, width: int, generator: torch.Generator) -> torch.Tensor:
    """Standard normal, (rows, tokens, width), drawn row by row so that no row's depends on padding."""
    drawn = torch.zeros(*batch.input_ids.shape, width)
    for row, length in enumerate(batch.lengths):
        drawn[row, :length] = torch.randn(length, width, generator=generator)
    return drawn


def _probabilities(context: Context, batch: Batch) -> torch.Tensor:
    """Geometric mean of the probabilities of each answer's tokens: (rows,)."""
    logits = all_logits(context.model, batch.input_ids, batch.attention_mask)
    log_probs = token_log_probs(logits, batch.input_ids)
    return row_means(log_probs, batch.answer_mask[:, 1:]).exp()


def _mlp(context: Context, layer: int) -> nn.Module:
    """The projection that writes the MLP's result to the residual stream."""
    return context.layout.layer(context.model, layer).get_submodule(context.layout.mlp_output)


@contextmanager
def _caught(context: Context, outputs: dict[int, torch.Tensor]) -> Iterator[None]:
    """Keeps every layer's MLP output of the body's pass."""

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            outputs[layer] = output

        return hook

    with ExitStack() as stack:
        for layer in range(context.layout.count):
            stack.enter_context(forward_hook(_mlp(context, layer), keep(layer)))
        yield


def _added(shift: torch.Tensor) -> Hook:
    def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + shift.to(output.dtype)

    return hook


def _replaced(clean: torch.Tensor, where: torch.Tensor) -> Hook:
    def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        # Some families give their MLP all rows as one: (rows * tokens, width).
        here = where.reshape(*output.shape[:-1], 1)
        return torch.where(here, clean.to(output.dtype), output)

    return hook
