"""Passes over rows that give each row's gradient of some linear maps, one map and row at a time.

A row's gradient of a map is G = sum_t g_t x_t^T over its tokens, from the map's inputs x and the
gradients g at its output. It exists while it is used and no longer, so that memory does not grow with
the number of rows. The loss of a row is the sum over its counted tokens; its windows are one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.data.batches import collate
from expunge.data.tokenization import Example
from expunge.maths.fisher import tapped
from expunge.maths.numerics import target_log_probs, unbroken_share, wide
from expunge.methods.forward import all_logits, head_takes_places, logits_at
from expunge.models.decoder import DecoderLayout, forward_hook, map_sizes
from expunge.models.kernels import fast_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Windows = Sequence[Example]
"""All examples of one row."""
Receive = Callable[[str, int, torch.Tensor, torch.Tensor], None]
"""Called with a map's name, the row's place, its inputs (tokens, in) and its gradients (tokens, out)."""


@dataclass(frozen=True)
class Known:
    """How well a model knows one row."""

    tokens: int
    """Counted tokens, over which the loss is a mean."""
    loss: float
    """Mean negative log-likelihood of the counted tokens, in nats."""
    answer_loss: float
    """The same of the answer's tokens."""
    recall: float
    """Share of the answer before its first token that greedy decoding, teacher-forced, gets wrong."""


def rows_of(examples: Sequence[Example]) -> list[Windows]:
    """The examples of each row together, in the order of the rows."""
    rows: dict[str, list[Example]] = {}
    for example in examples:
        rows.setdefault(example.row_id, []).append(example)
    return list(rows.values())


def linear_maps(model: nn.Module, layout: DecoderLayout, first: int, last: int) -> dict[str, nn.Module]:
    """The linear maps of decoder layers `first` to `last`, by full name."""
    names = layout.linears(layers=range(first, last + 1))
    return {name: model.get_submodule(name) for name in names}


class RowGradients:
    """Passes of one model over rows, with the gradients of some of its linear maps."""

    def __init__(
        self,
        model: PreTrainedModel,
        maps: Mapping[str, nn.Module],
        pad_id: int,
        batch_size: int,
    ) -> None:
        self.model, self.maps = model, maps
        self.pad_id, self.batch_size = pad_id, batch_size
        self._head_takes_places = head_takes_places(model)

    def run(
        self,
        rows: Sequence[Windows],
        receive: Receive | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Known]:
        """One pass, in which `receive` is given every row's factors of every map.

        Without `receive` there is no backward pass. Longest rows first, so that memory peaks at once.
        """
        known: dict[int, Known] = {}
        order = sorted(range(len(rows)), key=lambda place: -max(map(len, rows[place])))
        products = fast_products(self.model.dtype, self.model.device)
        with _frozen(self.model), torch.set_grad_enabled(receive is not None), products:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                known.update(zip(places, self._batch(rows, places, receive), strict=True))
                advance(len(places))
        return [known[place] for place in range(len(rows))]

    def gauss_newton(
        self,
        rows: Sequence[Windows],
        direction: Mapping[str, torch.Tensor],
        advance: Callable[[int], None] = lambda _: None,
    ) -> dict[str, torch.Tensor]:
        """sum_t J_t^T (diag(p_t) - p_t p_t^T) J_t `direction` over the rows' counted tokens.

        J_t is the Jacobian of a token's logits in the maps, p_t its probabilities: the Gauss-Newton
        matrix of the summed loss, which is the Fisher matrix of the model's own labels (Martens, arXiv
        1412.1193). `direction` and what is returned hold (out, in) by map. Forward mode gives J v, an
        ordinary backward pass J^T u.
        """
        found = blocks_of_zeros(self.maps)

        def add(name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
            inputs = wide(with_ones(inputs, self.maps[name]))
            # Padding has no gradient.
            found[name] += gradient_of(inputs.flatten(0, 1), wide(gradients).flatten(0, 1))

        windows = sorted((w for row in rows for w in row), key=len, reverse=True)
        for start in range(0, len(windows), self.batch_size):
            examples = windows[start : start + self.batch_size]
            batch = collate(examples, range(len(examples)), self.pad_id).to(self.model.device)
            where = batch.token_mask[:, 1:]
            inputs = (where, batch.input_ids, batch.attention_mask)
            tangent = self._tangent(direction, *inputs)
            products = fast_products(self.model.dtype, self.model.device)
            with _frozen(self.model), tapped(self.maps, add, len(examples)), products:
                logits = self._logits(*inputs)
                logits.backward(output_product(logits.detach(), tangent))
            advance(len(examples))
        return found

    @torch.no_grad()
    def _tangent(self, direction: Mapping[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """How the logits at the marked places change along `direction`, (marked, vocabulary)."""
        # Fused attention has no forward mode.
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), moved(self.maps, direction):
            tangent: torch.Tensor = forward_ad.unpack_dual(self._logits(*inputs)).tangent
            return tangent

    def counted(self, rows: Sequence[Windows]) -> int:
        """How many tokens the losses of these rows count; at least 1."""
        return max(1, sum(sum(window.token_mask[1:]) for row in rows for window in row))

    def _batch(
        self,
        rows: Sequence[Windows],
        places: Sequence[int],
        receive: Receive | None,
    ) -> list[Known]:
        """Runs some rows, each with all its windows."""
        examples = [window for place in places for window in rows[place]]
        spans = _spans([len(rows[place]) for place in places])
        batch = collate(examples, range(len(examples)), self.pad_id).to(self.model.device)
        where = batch.token_mask[:, 1:]
        answers = batch.answer_mask[:, 1:]
        real = batch.attention_mask.bool()

        def split(name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
            assert receive is not None
            inputs, gradients = wide(with_ones(inputs, self.maps[name])), wide(gradients)
            for place, span in zip(places, spans, strict=True):
                receive(name, place, inputs[span][real[span]], gradients[span][real[span]])

        with tapped({} if receive is None else self.maps, split, len(examples)):
            chosen = self._logits(where, batch.input_ids, batch.attention_mask)
            targets = batch.input_ids[:, 1:][where]
            values = -target_log_probs(chosen, targets)
            if receive is not None:
                values.sum().backward()
        losses = values.detach().new_zeros(where.shape).masked_scatter(where, values.detach())
        right = torch.zeros_like(where).masked_scatter(where, chosen.argmax(-1) == targets)
        return [_known(losses[span], right[span], where[span], answers[span]) for span in spans]

    def _logits(
        self, where: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits that predict the marked tokens, (marked, vocabulary); `where` is (rows, tokens - 1)."""
        if not self._head_takes_places:
            return all_logits(self.model, input_ids, attention_mask)[:, :-1][where]
        before = nn.functional.pad(where, (0, 1))
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return logits_at(self.model, before, **inputs, use_cache=False)


@contextmanager
def moved(maps: Mapping[str, nn.Module], direction: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Forward-mode passes in the body are differentiated along `direction`, (out, in) by map.

    Each map's output gets s V x with s = 0 and ds = 1, so that no weight is touched.
    """

    def hook_of(name: str) -> Callable[..., torch.Tensor]:
        def hook(
            module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            zero, one = output.new_zeros(()), output.new_ones(())
            along = with_ones(args[0], module) @ direction[name].to(output.dtype).T
            return output + forward_ad.make_dual(zero, one) * along

        return hook

    with ExitStack() as stack:
        for name, module in maps.items():
            stack.enter_context(forward_hook(module, hook_of(name)))
        yield


def output_product(logits: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """(diag(p) - p p^T) times a tangent, p the softmax: both (n, vocabulary)."""
    p, tangent = wide(logits).softmax(-1), wide(tangent)
    return (p * (tangent - (p * tangent).sum(-1, keepdim=True))).to(logits.dtype)


def gradient_of(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """sum_t g_t x_t^T: inputs (tokens, in), gradients (tokens, out) -> (out, in)."""
    return gradients.T @ inputs


def along(inputs: torch.Tensor, gradients: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """A row's gradient times `step` (out, in), summed to a scalar; the gradient is never formed."""
    return ((inputs @ step.T) * gradients).sum()


def block_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a map's gradient, its bias as a last column."""
    out, inside = map_sizes(module)
    return out, inside + (getattr(module, "bias", None) is not None)


def with_ones(inputs: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A map's inputs (..., in), with a last column of ones where it has a bias."""
    if getattr(module, "bias", None) is None:
        return inputs
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)


def blocks_of_zeros(maps: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """For every map a sum of gradients, (out, in), still 0."""
    return {
        name: wide(module.get_parameter("weight").detach().new_zeros(block_shape(module)))
        for name, module in maps.items()
    }


def _spans(counts: Sequence[int]) -> list[slice]:
    spans, start = [], 0
    for count in counts:
        spans.append(slice(start, start + count))
        start += count
    return spans


def _known(
    losses: torch.Tensor, right: torch.Tensor, counted: torch.Tensor, answers: torch.Tensor
) -> Known:
    """Of one row's windows, (windows, tokens - 1) each; an answer has a token, a loss may count none."""
    whole = unbroken_share(right.flatten()[None], answers.flatten()[None])
    return Known(
        tokens=int(counted.sum()),
        loss=float(losses[counted].sum()) / max(1, int(counted.sum())),
        answer_loss=float(losses[answers].sum()) / max(1, int(answers.sum())),
        recall=float(whole),
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient in the body: only the taps do."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
