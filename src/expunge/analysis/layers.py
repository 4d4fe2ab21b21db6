"""Which layer to steer, from one pass over a sample of rows of the target model.

Of every sampled forget row several variants run side by side in one batch: the row itself (clean), the
row with its prompt's tokens exchanged (corrupted), and for each layer the corrupted row into which the
clean states of that layer are put back, at the places that predict the answer (patching; Meng et al.,
arXiv 2202.05262). In the place of the last layer's output stand the states that are to be read, from
the first place on, so that its shape stays whatever a family does with it.
The model's own final norm and head then give the log-probabilities of every variant, and of every
layer's states as if they were the last's (logit lens), so that nothing here is made for one family. What
the numbers mean and how they become one score: layer_scores.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from expunge.analysis.layer_rows import ANSWER_TOKENS, SampledRow, corrupted_ids, sampled
from expunge.analysis.layer_scores import combined, separate, share
from expunge.data.tokenization import Example
from expunge.maths.numerics import target_log_probs
from expunge.methods.forward import logits_at
from expunge.models.decoder import DecoderLayout, forward_hook, states_of, with_states
from expunge.models.parts import Parts
from expunge.segments.engine import Autocast, pass_tokens_on, read_in_turn

_HEAD = 8
"""Tokens of a pass through the layers that take about the memory of one through the head."""


@dataclass(frozen=True)
class LayerReading:
    """What was measured of one layer, and its score; shares are in [0, 1]."""

    layer: int
    """Counted from 0."""
    score: float | None
    """Geometric mean of the shares; None where the sample shows nothing that was memorised."""
    decodable: float | None
    """Share of the answers' log-probability that the final norm and head find in the layer's states."""
    restored: float | None
    """Share of the answers' log-probability that the layer's clean states bring to a corrupted row."""
    separate: float | None
    """How far inputs of the trained projections are from those of retain rows; None without them."""


@dataclass(frozen=True)
class LayerChoice:
    """The layer to steer and what it was chosen by."""

    layer: int
    why: str
    warning: str | None
    """Said to the user where the scores do not decide."""
    readings: tuple[LayerReading, ...]
    """One for each layer that can be steered; empty where there is only one."""
    rows: Mapping[str, int]
    clean: float | None
    """Mean log-probability of the answers' tokens in the target model, in nats."""
    corrupted: float | None
    """The same after an exchanged prompt."""

    def to_json(self) -> dict[str, Any]:
        """Numbers only; what a manifest holds."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerChoice:
        """Reads what `to_json` gave."""
        readings = tuple(LayerReading(**reading) for reading in values["readings"])
        return cls(**{**values, "readings": readings})


def choose_layer(
    parts: Parts,
    layout: DecoderLayout,
    forget: Sequence[Example],
    retain: Sequence[Example],
    trained: int,
    usual: int,
    *,
    seed: int,
    autocast: Autocast,
    progress: Callable[[str, int, int], None],
) -> LayerChoice:
    """Reads every layer that has `trained` - 1 layers below it, and chooses the one of highest score.

    Of equal scores the deeper layer is taken. `usual` is taken, with a warning, where the target knows
    no more of the sampled answers with their prompts than without.
    """
    if layout.count == trained:
        why = f"the only layer with {trained - 1} below it"
        return LayerChoice(trained - 1, why, None, (), {}, None, None)
    reading = LayerPass(parts, layout, forget, retain, trained, seed=seed, autocast=autocast)
    if not reading.rows["forget"]:
        warning = f"--method.layer auto: no forget row can be read; layer {usual} is steered"
        return LayerChoice(usual, "84% of the depth", warning, (), reading.rows, None, None)
    reading.run(progress)
    readings, clean, corrupted = reading.readings(), reading.mean_clean, reading.mean_corrupted
    scored = [reading for reading in readings if reading.score]
    if not scored:
        warning = (
            f"--method.layer auto: prompts do not help the target to the sampled answers (mean"
            f" log-probability {clean:.2f}, without them {corrupted:.2f}); layer {usual} is steered"
        )
        why = "84% of the depth"
        return LayerChoice(usual, why, warning, readings, reading.rows, clean, corrupted)
    best = max(scored, key=lambda reading: (reading.score or 0.0, reading.layer))
    why = f"highest score {best.score:.4f} of {len(readings)} layers"
    return LayerChoice(best.layer, why, None, readings, reading.rows, clean, corrupted)


class LayerPass:
    """Runs the sampled rows and their variants, and gathers what is measured of them."""

    def __init__(
        self,
        parts: Parts,
        layout: DecoderLayout,
        forget: Sequence[Example],
        retain: Sequence[Example],
        trained: int,
        *,
        seed: int,
        autocast: Autocast,
        pass_tokens: int | None = None,
    ) -> None:
        """`pass_tokens`: how many tokens a pass should hold; None: what the device should."""
        self._parts, self._layout, self._autocast = parts, layout, autocast
        self._pass_tokens = pass_tokens or pass_tokens_on(parts.device.type)
        self._trained = trained
        self._candidates = range(trained - 1, layout.count)
        self._patched = self._candidates[:-1]  # the last layer's clean states are the row's own
        self._variants = 2 + len(self._patched)
        drawn = torch.Generator().manual_seed(seed)
        self._sides = {"forget": sampled(forget, drawn), "retain": sampled(retain, drawn)}
        self._spoilt = corrupted_ids(self._sides["forget"], drawn)
        self._clean: list[torch.Tensor] = []
        self._corrupted: list[torch.Tensor] = []
        self._patches: list[torch.Tensor] = []
        self._lens: list[torch.Tensor] = []
        self._vocabulary = 0
        self._inputs: dict[str, list[list[torch.Tensor]]] = {
            side: [[] for _ in range(layout.count)] for side in self._sides
        }

    @property
    def rows(self) -> dict[str, int]:
        """How many rows are read of each side."""
        return {side: len(rows) for side, rows in self._sides.items()}

    @property
    def mean_clean(self) -> float:
        """Mean log-probability of the answers' tokens."""
        return float(torch.stack(self._clean).mean())

    @property
    def mean_corrupted(self) -> float:
        """The same after an exchanged prompt."""
        return float(torch.stack(self._corrupted).mean())

    def run(self, progress: Callable[[str, int, int], None]) -> None:
        """Every pass."""
        done, total = 0, sum(self.rows.values())
        with read_in_turn(self._parts, self._layout):
            for side, rows in self._sides.items():
                chunks = self._chunks(rows, self._variants if side == "forget" else 1)
                for chunk in chunks:
                    self._read(side, chunk)
                    done += len(chunk)
                    progress("layers", done, total)

    def _chunks(self, rows: Sequence[SampledRow], variants: int) -> list[list[int]]:
        """Indices of rows, longest first, so many at once as a pass should hold."""
        chunks: list[list[int]] = []
        # States that the head runs on: a vocabulary is many times as wide as a layer.
        read = (variants + len(self._patched) if variants > 1 else 1) * ANSWER_TOKENS * _HEAD
        for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i)):
            chunk = chunks[-1] if chunks else []
            longest = len(rows[chunk[0]].ids) if chunk else 0
            size = (len(chunk) + 1) * max(variants * longest, read)
            if chunk and size <= self._pass_tokens:
                chunk.append(index)
            else:
                chunks.append([index])
        return chunks

    def _read(self, side: str, chunk: Sequence[int]) -> None:
        """One pass over some rows of a side; those to keep have no variants."""
        rows, varied = self._sides[side], side == "forget"
        variants = self._variants if varied else 1
        batch = []
        for index in chunk:
            batch.append(rows[index].ids)
            if varied:
                batch += [self._spoilt[index]] * (variants - 1)
        places = [(n, place) for n, index in enumerate(chunk) for place in rows[index].places]
        read = len(places) * (variants + (len(self._patched) if varied else 0))
        width = max(*map(len, batch), -(-read // len(batch)))
        device = self._parts.device
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        mask = (torch.arange(width, device=device)[None] < lengths[:, None]).long()
        taken = _Taken(
            ids.shape,
            self._layout.count - 1,
            variants,
            torch.tensor([n * variants for n, _ in places], device=device),
            torch.tensor([place for _, place in places], device=device),
            {layer: 2 + i for i, layer in enumerate(self._patched)} if varied else {},
            self._patched if varied else (),
        )
        with ExitStack() as stack:
            for layer in range(self._layout.count):
                module = self._layout.layer(self._parts.model, layer)
                stack.enter_context(forward_hook(module, taken.hook(layer)))
                projection = module.get_submodule(self._layout.mlp_output)
                handle = projection.register_forward_pre_hook(taken.input_hook)
                stack.callback(handle.remove)
            with torch.no_grad(), self._autocast():
                where = (torch.arange(ids.numel()) < read).view(ids.shape)
                logits = logits_at(
                    self._parts.model, where, input_ids=ids, attention_mask=mask, use_cache=False
                )
        for layer, inputs in enumerate(taken.inputs):
            self._inputs[side][layer].append(inputs.float().cpu())
        if varied:
            targets = [target for index in chunk for target in rows[index].targets]
            counts = [len(rows[index].places) for index in chunk]
            self._take(logits, torch.tensor(targets, device=device), counts)

    def _take(self, logits: torch.Tensor, targets: torch.Tensor, counts: Sequence[int]) -> None:
        """Log-probabilities of the variants and of the lens: logits (pieces * places, vocabulary)."""
        self._vocabulary = logits.shape[-1]
        pieces = len(logits) // len(targets)
        repeated = targets.repeat(pieces)
        log_probs = target_log_probs(logits, repeated).view(pieces, -1).cpu()
        for found in log_probs.split(list(counts), 1):
            means = found.mean(1)
            lens, (clean, corrupted), patched = means.split([len(self._patched), 2, len(self._patched)])
            self._clean.append(clean)
            self._corrupted.append(corrupted)
            self._lens.append(torch.cat([lens, clean[None]]))
            self._patches.append(torch.cat([patched, clean[None]]))

    def readings(self) -> tuple[LayerReading, ...]:
        """Everything that was measured, layer by layer."""
        clean, corrupted = torch.stack(self._clean), torch.stack(self._corrupted)
        guess = torch.full_like(clean, -float(torch.tensor(self._vocabulary).log()))
        lens = torch.stack(self._lens)
        decodable = share(lens, guess, clean)
        restored = share(torch.stack(self._patches), corrupted, clean)
        apart = self._separations()
        readings = []
        for number, layer in enumerate(self._candidates):
            found = None if decodable is None else float(decodable[number])
            brought = None if restored is None else float(restored[number])
            score = None
            if found is not None and brought is not None:
                distance = [] if apart[layer] is None else [apart[layer] or 0.0]
                score = combined([found, brought, *distance])
            readings.append(LayerReading(layer, score, found, brought, apart[layer]))
        return tuple(readings)

    def _separations(self) -> dict[int, float | None]:
        """By candidate, the mean over the layers that would be trained."""
        if not self._inputs["retain"][0]:
            return dict.fromkeys(self._candidates)
        of_layer = [
            separate(torch.cat(forget), torch.cat(retain))
            for forget, retain in zip(self._inputs["forget"], self._inputs["retain"], strict=True)
        ]
        return {
            layer: statistics.fmean(of_layer[layer + 1 - self._trained : layer + 1])
            for layer in self._candidates
        }


@dataclass(repr=False)
class _Taken:
    """What the hooks of one pass take, and what they put in its place."""

    shape: torch.Size
    """Of the batch."""
    last: int
    variants: int
    rows: torch.Tensor
    """(n,): rows of the clean states that are read."""
    places: torch.Tensor
    """(n,): their places."""
    patches: Mapping[int, int]
    lens: Sequence[int]
    states: list[torch.Tensor] = field(default_factory=list)
    """Clean states that each layer gives at the places, (n, width)."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """Inputs of each layer's MLP output projection there, (n, its width)."""

    def input_hook(self, _module: nn.Module, args: Any) -> None:
        """What a projection is given."""
        # Some families give their MLP all rows as one.
        self.inputs.append(args[0].reshape(*self.shape, -1)[self.rows, self.places])

    def hook(self, layer: int) -> Callable[..., Any]:
        """Patches what a layer gives; behind the last layer what is to be read stands first."""

        def run(_module: nn.Module, _inputs: object, output: Any) -> Any:
            given = states_of(output)
            self.states.append(given[self.rows, self.places])
            changed = given
            if layer in self.patches:
                changed = given.clone()
                changed[self.rows + self.patches[layer], self.places] = self.states[-1]
            if layer == self.last:
                variants = [given[self.rows + v, self.places] for v in range(self.variants)]
                pieces = [*(self.states[read] for read in self.lens), *variants]
                read = torch.cat(pieces)
                changed = given.clone()
                changed.flatten(0, 1)[: len(read)] = read
            return with_states(output, changed)

        return run
