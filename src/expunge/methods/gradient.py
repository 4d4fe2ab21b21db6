"""What the methods that train on token probabilities share: settings, trained weights, reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from expunge.data.batches import Batch, Tokens
from expunge.data.tokenization import Example
from expunge.errors import InputError
from expunge.maths.losses import cross_entropy, token_kl
from expunge.maths.numerics import row_sums, target_log_probs
from expunge.methods.base import (
    Context,
    Finished,
    Method,
    Objective,
    OptimizerSpec,
    Terms,
    check_numbers,
    check_random_rows,
)
from expunge.methods.forward import (
    all_logits,
    head_takes_places,
    logits_at,
    recomputed,
)
from expunge.models.decoder import DecoderLayout, Targets
from expunge.models.lora import Adapter, LoraShape
from expunge.models.sharding import is_sharded, whole
from expunge.models.weights import snapshot, swapped_in, train_only


@dataclass(frozen=True)
class TokenSettings(Method):
    """Settings of every method that trains on token probabilities."""

    targets: Targets = "all"
    """Which linear maps of a decoder layer are trained."""
    tokens: Tokens = "all"
    """Which tokens the losses count: all, the output given the input, or of questions the output
    only. `spectral` and `libu` hold all tokens of retain rows, whatever is forgotten."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass, at the price of a second forward pass."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_random_rows(self.random_rows)
        for option in ("lora_alpha", "beta"):
            if getattr(self, option, None) == 0:
                raise InputError(f"--method.{option} 0: must be positive")

    @property
    def needs_retain(self) -> bool:
        """Whether the loss has a retain term: it does unless its weight is absent or 0."""
        return getattr(self, "retain_weight", 0) > 0

    def shape(self, layers: Sequence[int] | None = None) -> LoraShape | None:
        """The adapter on some layers, or all; None: weights are trained themselves."""
        return None

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter to keep."""
        return self.shape() is not None

    def check(self, layout: DecoderLayout) -> None:
        """Raises InputError where the model has none of the linear maps to train."""
        if not layout.linears(self.targets):
            raise InputError(
                f"--method.targets {self.targets}: the model has no such linear maps; leave it out"
            )


@dataclass(frozen=True)
class LoraSettings(TokenSettings):
    """Settings of methods that train a low-rank adapter."""

    rank: int = 32
    """Rank of the adapter."""
    lora_alpha: float = 32.0
    """The adapter's product is scaled by lora_alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input in training steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InputError(f"--method.rank {self.rank}: must be 1 or more")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--method.lora_dropout {self.lora_dropout}: must be in [0, 1)")

    def shape(self, layers: Sequence[int] | None = None) -> LoraShape | None:
        """Of these settings."""
        chosen = None if layers is None else tuple(layers)
        return LoraShape(self.rank, self.lora_alpha, self.lora_dropout, self.targets, chosen)


@dataclass(frozen=True)
class GradientSettings(LoraSettings):
    """Settings of methods that train an adapter or every weight."""

    parameters: Literal["lora", "full"] = "lora"
    """Train a low-rank adapter, or every weight of the model."""

    def shape(self, layers: Sequence[int] | None = None) -> LoraShape | None:
        """None where every weight is trained."""
        return super().shape(layers) if self.parameters == "lora" else None


class GradientObjective(Objective):
    """An adapter, or all weights, of one model, with the model from before as reference."""

    optimizer = OptimizerSpec("adamw", {"weight_decay": 0.0})

    def __init__(
        self,
        settings: TokenSettings,
        context: Context,
        *,
        needs_reference: bool = False,
        layers: Sequence[int] | None = None,
        weights: Sequence[str] | None = None,
    ) -> None:
        """`layers` are those that an adapter is put on, `weights` what is trained without one."""
        self._settings = settings
        self._model = context.model
        self._layout = context.layout
        self._tokens = settings.tokens
        self._recomputed = (
            list(context.model.get_submodule(context.layout.layers).children())
            if settings.gradient_checkpointing
            else []
        )
        with context.autocast():
            self._head_takes_places = head_takes_places(context.model)
        self._dtype = context.model.dtype
        self._keeps_result = context.processes.is_main
        self.adapter: Adapter | None = None
        self._frozen: dict[str, torch.Tensor] = {}
        shape = settings.shape(layers)
        if shape is not None:
            seed = context.seed_of("adapter")
            self.adapter = Adapter(context.model, context.layout, shape, seed)
            self.parameters = self.adapter.parameters
        else:
            names = [name for name, _ in context.model.named_parameters()]
            self.parameters = train_only(context.model, names if weights is None else weights)
            if needs_reference:
                self._frozen = {n: p.detach().clone() for n, p in self.parameters.items()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Runs the body with the model from before, without gradients: no second model is kept."""
        if self.adapter is not None:
            with self.adapter.off():
                yield
        else:
            with swapped_in(self.parameters, self._frozen):
                yield

    def logits(self, batch: Batch) -> torch.Tensor:
        """(rows, tokens, vocabulary)."""
        with self._kept():
            return all_logits(self._model, batch.input_ids, batch.attention_mask)

    def counted_logits(self, batch: Batch, tokens: Tokens | None = None) -> torch.Tensor:
        """Logits of the places that predict a counted token, in reading order.

        (counted tokens, vocabulary): the head runs nowhere else. `tokens` counts others than the
        settings' own.
        """
        return self._logits_at(batch, self._places(batch, tokens))

    def _places(self, batch: Batch, tokens: Tokens | None) -> torch.Tensor:
        return functional.pad(batch.mask(tokens or self._tokens)[:, 1:], (0, 1))

    def _logits_at(self, batch: Batch, where: torch.Tensor) -> torch.Tensor:
        if not self._head_takes_places:
            return self.logits(batch)[where]
        with self._kept():
            return logits_at(
                self._model,
                where,
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
            )

    def log_probs(self, batch: Batch, tokens: Tokens | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each counted token, 0 elsewhere, and their mask: (rows, tokens - 1)."""
        mask = batch.mask(tokens or self._tokens)[:, 1:]
        counted = target_log_probs(self.counted_logits(batch, tokens), batch.input_ids[:, 1:][mask])
        return counted.new_zeros(mask.shape).masked_scatter(mask, counted), mask

    def cross_entropy(self, batch: Batch) -> torch.Tensor:
        """Mean negative log-likelihood of the batch's counted tokens."""
        return cross_entropy(*self.log_probs(batch))

    def with_retain(self, forget_term: torch.Tensor, retain: Batch | None, weight: float) -> Terms:
        """Adds the retain term: weight * CE(retain)."""
        if retain is None or weight == 0:
            return Terms(forget_term, None)
        return Terms(forget_term, weight * self.cross_entropy(retain))

    def held(self, retain: Batch, ce_weight: float, kl_weight: float) -> torch.Tensor:
        """ce_weight * CE + kl_weight * KL(target || model) of retain text, from one pass: a scalar."""
        mask = retain.mask(self._tokens)[:, 1:]
        logits = self.counted_logits(retain)
        nll = -target_log_probs(logits, retain.input_ids[:, 1:][mask])
        total = ce_weight * nll.sum()
        if kl_weight > 0:
            with self.reference():
                before = self.counted_logits(retain)
            total = total + kl_weight * token_kl(logits, before).sum()
        return total / max(1, len(nll))

    def log_probs_before(
        self,
        context: Context,
        examples: Sequence[Example],
        phase: str,
        tokens: Tokens | None = None,
    ) -> torch.Tensor:
        """Each row's summed log-probability and its counted tokens, (examples, 2), as the model is."""
        found = torch.zeros(len(examples), 2, device=context.device)
        for batch in context.passes(examples, phase):
            with torch.no_grad(), context.autocast():
                log_probs, mask = self.log_probs(batch, tokens)
            sums = torch.stack([row_sums(log_probs, mask), mask.sum(1).float()], dim=1)
            found[list(batch.indices)] = sums
        return found

    def drift(self, batch: Batch) -> torch.Tensor:
        """KL(target || model) of every counted token, in nats: (counted tokens,)."""
        with self.reference():
            before = self.counted_logits(batch)
        return token_kl(self.counted_logits(batch), before)

    def forget_size(self, batch: Batch) -> int:
        """Most forget terms are means over counted tokens."""
        return int(batch.mask(self._tokens)[:, 1:].sum())

    def retain_size(self, batch: Batch) -> float:
        """Every retain term is a mean over counted tokens."""
        return int(batch.mask(self._tokens)[:, 1:].sum())

    def _kept(self) -> AbstractContextManager[None]:
        """Around a forward pass: which activations are kept for the backward pass, if there is one."""
        return recomputed(self._recomputed if torch.is_grad_enabled() else [])

    def set_training(self, active: bool) -> None:
        """Adapter dropout is on in training steps only."""
        if self.adapter is not None:
            self.adapter.set_dropout(active)

    def notes(self) -> Mapping[str, Any]:
        """How many numbers are trained, and where the LM head runs."""
        return {
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
            "logits": "of counted tokens" if self._head_takes_places else "of all tokens",
        }

    def finish(self, *, keep_adapter: bool) -> Finished:
        """Merges the adapter in float32, or takes the masters; casts to the model's dtype once.

        Sharded weights stay as they are, and only a process that keeps the result has it.
        """
        if self.adapter is not None:
            adapter = self.adapter.state() if keep_adapter else None
            config = self.adapter.config.to_dict() if keep_adapter else None
            return Finished(self.adapter.merge(keep=self._keeps_result), adapter, config)
        weights: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            value = whole(parameter)
            if self._keeps_result:
                weights |= snapshot({name: value})
            parameter.requires_grad_(False)
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(self._dtype)
        return Finished(weights)
