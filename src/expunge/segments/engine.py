"""The segment engine: what never changes runs once, what changes runs alone, nothing else runs.

A method that trains layers `first` to `last` against a loss on the output of `last` needs, of a row,
only the states below `first`, and of the frozen model only the states at `last`. Both are computed
once and kept in memory-mapped files; an epoch runs the trained layers on packed rows. Layers above
`last` and the head are in memory only where candidates are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expunge.data.batches import Batch, collate
from expunge.data.tokenization import Example
from expunge.errors import ExpungeError
from expunge.models.decoder import DecoderLayout, forward_hook, hidden_states, states_of
from expunge.models.parts import Parts, loaded_in_turn
from expunge.models.weights import swapped_in
from expunge.processes import OneProcess, Processes
from expunge.segments.cache_layout import CacheLayout, Slot
from expunge.segments.packing import NotASegment
from expunge.segments.segment import Segment, relative_error
from expunge.segments.states import StateFile
from expunge.terminal import counting

if TYPE_CHECKING:
    from expunge.segments.prefix import Prefix

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_PASS_TOKENS = {"cpu": 1024}
_PASS_TOKENS_ACCELERATOR = 32768
Autocast = Callable[[], AbstractContextManager[Any]]


def pass_tokens_on(device_type: str) -> int:
    """Tokens that a pass should hold on a device of this type."""
    return _PASS_TOKENS.get(device_type, _PASS_TOKENS_ACCELERATOR)


class SegmentEngine:
    """Runs layers `first` to `last` of a model; hidden states are flat, (tokens, width)."""

    path = "segment"

    def __init__(
        self,
        parts: Parts,
        layout: DecoderLayout,
        first: int,
        last: int,
        autocast: Autocast,
        *,
        measures: bool,
        processes: Processes | None = None,
    ) -> None:
        """`measures`: whether `next_tokens` will be asked for, which takes the layers above.

        Several processes fill one cache together and each read all of it.

        Raises NotASegment.
        """
        self._parts, self._layout, self._autocast = parts, layout, autocast
        self._first, self._last, self._measures = first, last, measures
        self._names = module_names(parts.model, layout)
        with _cut_off():
            self._segment = Segment(parts.model, layout, first, last)
            self._upper = Segment(parts.model, layout, first, layout.count - 1)
            self._prefix = Segment(parts.model, layout, 0, first - 1)
        self._processes = processes or OneProcess()
        self._cache: CacheLayout | None = None
        self._trained: Mapping[str, nn.Parameter] = {}
        self._frozen: Mapping[str, torch.Tensor] = {}
        self.pass_tokens = pass_tokens_on(parts.device.type)

    def check(self, examples: Sequence[Example]) -> dict[str, float]:
        """Relative errors against the whole model's own forward pass, on three rows.

        Raises NotASegment where one is beyond rounding.
        """
        ordered = sorted(examples, key=len)
        chosen = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
        batch = collate(chosen, range(len(chosen)), 0).to(self._parts.device)
        real = batch.attention_mask.bool()
        ids, lengths = batch.input_ids[real], real.sum(1).tolist()
        self._parts.load(*self._names.others)
        if self._measures:
            self._parts.load(*self._names.head)
        errors = {}
        with (
            torch.no_grad(),
            self._autocast(),
            loaded_in_turn(
                self._parts, [self._names.embedding, *self._layers(0, self._layout.count - 1)]
            ),
        ):
            whole = self._whole(batch)
            below = whole["below"][real]
            with _cut_off():
                if self._first > 0:
                    errors["below"] = relative_error(self._prefix.from_ids(ids, lengths), below)
                errors["states"] = relative_error(self._segment(below, lengths), whole["states"][real])
                if self._measures:
                    errors["logits"] = relative_error(
                        self._upper.logits(below, lengths), whole["logits"][real]
                    )
        tolerance = _TOLERANCE[self._parts.model.dtype]
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        if wrong:
            told = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
            raise NotASegment(f"its layers on their own differ from the whole model ({told})")
        return errors

    def _whole(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the model's own forward pass gives, (rows, tokens, ...)."""
        caught: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
                caught[name] = states_of(output)

            return hook

        model = self._parts.model
        below = (
            self._layout.layer(model, self._first - 1)
            if self._first > 0
            else model.get_submodule(self._names.embedding)
        )
        with (
            forward_hook(below, keep("below")),
            forward_hook(self._layout.layer(model, self._last), keep("states")),
        ):
            if self._measures:
                caught["logits"] = model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                ).logits
            else:
                hidden_states(model, self._layout, self._last, batch)
        return caught

    def fill(
        self,
        cache: CacheLayout,
        directory: Path,
        progress: Callable[[str, int, int], None],
        *,
        filled: bool = False,
        prefix: Prefix | None = None,
    ) -> None:
        """Computes what `cache` holds into files in `directory` and brings the segment into memory.

        With `filled` the files are those of an earlier, complete fill. With `prefix` the fill begins
        where the states are that an earlier run on the same rows left there, and leaves its own. Raises
        OSError.
        """
        self._cache = cache
        # A cache narrower than the model would round what passes through it once more.
        if cache.dtype != self._parts.model.dtype:
            prefix = None
        begun = 0
        if prefix is not None and not filled:
            if self._processes.is_main:
                begun = prefix.take(cache, self._first, directory / "below")
            begun = self._processes.gather(begun)[0]
        dtype, width = cache.dtype, cache.width
        self._below = StateFile(directory / "below", cache.tokens, width, dtype)
        self._targets = StateFile(directory / "targets", cache.trained, width, dtype)
        self._norms = StateFile(directory / "norms", cache.trained, 1, torch.float32)
        groups = self._groups(begun)
        trained = sum(slot.start < cache.trained for slot in cache.slots.values())
        total = len(cache.slots) * len(groups) + trained
        advance = counting(lambda done: progress("cache", done, total))
        if not filled:
            for first, last in groups:
                self._fill_below(first, last, advance)
        if cache.missing:
            self._parts.load(self._names.embedding, *self._layers(0, self._first - 1))
        self._parts.load(*self._layers(self._first, self._last))
        if not filled:
            self._fill_targets(advance)
        if prefix is not None and self._processes.is_main:
            prefix.keep(cache, self._first, directory / "below")
        if self._measures:
            above = self._layers(self._last + 1, self._layout.count - 1)
            self._parts.load(*above, *self._names.head)

    def freeze(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Takes the trained parameters' present values as the frozen model's."""
        self._trained = trained
        if self._cache is not None and self._cache.missing:
            self._frozen = {name: value.detach().clone() for name, value in trained.items()}

    def now(self, *batches: Batch) -> list[torch.Tensor]:
        """Output of the last layer for each batch, with gradients; all in one pass."""
        inputs = [self._states_below(batch) for batch in batches]
        lengths = [length for batch in batches for length in batch.lengths]
        states = self._segment(torch.cat(inputs), lengths)
        return list(states.split([len(part) for part in inputs]))

    def before(self, batch: Batch) -> torch.Tensor:
        """What the output of the last layer was in the frozen model."""
        slots = self._slots(batch)
        if slots is not None:
            return self._targets.read([slot.span for slot in slots]).to(self._parts.device)
        with swapped_in(self._trained, self._frozen):
            return self.now(batch)[0]

    def norms_before(self, batch: Batch) -> torch.Tensor:
        """Norms of `before`, (tokens,), float32."""
        slots = self._slots(batch)
        if slots is not None:
            return self._norms.read([slot.span for slot in slots])[:, 0].to(self._parts.device)
        return self.before(batch).float().norm(dim=-1)

    def next_tokens(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token and whether greedy decoding gives it: (rows, tokens - 1)."""
        lengths = batch.lengths
        flat = self._upper.logits(self._states_below(batch), lengths)
        shape = (len(lengths), batch.input_ids.shape[1] - 1)
        log_probs = torch.zeros(shape, device=flat.device)
        right = torch.zeros(shape, dtype=torch.bool, device=flat.device)
        for row, logits in enumerate(flat.split(lengths)):
            ids = batch.input_ids[row, 1 : lengths[row]]
            scores = logits[:-1].float()
            chosen = scores.gather(1, ids[:, None])[:, 0]
            log_probs[row, : len(ids)] = chosen - scores.logsumexp(-1)
            right[row, : len(ids)] = scores.argmax(-1) == ids
        return log_probs, right

    def _states_below(self, batch: Batch) -> torch.Tensor:
        """States below the first layer, (tokens, width), of a batch's rows one after the other."""
        slots = self._slots(batch)
        if slots is not None:
            below = self._below.read([slot.span for slot in slots])
            return below.to(self._parts.device, self._parts.model.dtype)
        assert self._cache is not None
        assert self._cache.missing, "rows that were not laid out"
        with torch.no_grad():
            return self._prefix.from_ids(batch.packed(batch.input_ids), batch.lengths)

    def _slots(self, batch: Batch) -> list[Slot] | None:
        """The slots of a batch's rows, or None where one of them has none."""
        assert self._cache is not None
        slots = [self._cache.slots.get(example.input_ids) for example in batch.examples]
        return None if None in slots else slots  # type: ignore[return-value]

    def _groups(self, begun: int = 0) -> list[tuple[int, int]]:
        """Layers from `begun` to the segment that are in memory together while the cache is filled."""
        assert self._cache is not None
        size = self._last - self._first + 1
        # States that pass through a narrower file between two groups would be rounded each time.
        if not self._parts.streamed or self._cache.dtype != self._parts.model.dtype:
            size = max(1, self._first)
        return [
            (first, min(first + size, self._first) - 1) for first in range(begun, self._first, size)
        ] or ([] if begun else [(0, -1)])

    def _fill_below(self, first: int, last: int, advance: Callable[[int], None]) -> None:
        segment = Segment(self._parts.model, self._layout, first, last)
        modules = self._layers(first, last)
        self._parts.load(*modules)
        if first == 0:
            self._parts.load(self._names.embedding)
        for ids, slots in self._passes(trained_only=False):
            lengths = [slot.length for slot in slots]
            with torch.no_grad(), self._autocast():
                if first == 0:
                    states = segment.from_ids(ids.to(self._parts.device), lengths)
                else:
                    below = self._below.read([(slots[0].start, sum(lengths))])
                    states = segment(below.to(self._parts.device), lengths)
            self._below.write(slots[0].start, states)
            advance(len(slots))
        self._parts.release(*modules)
        if first == 0:
            self._parts.release(self._names.embedding)
        self._settle()

    def _fill_targets(self, advance: Callable[[int], None]) -> None:
        for _, slots in self._passes(trained_only=True):
            lengths = [slot.length for slot in slots]
            below = self._below.read([(slots[0].start, sum(lengths))])
            with torch.no_grad(), self._autocast():
                states = self._segment(below.to(self._parts.device, self._parts.model.dtype), lengths)
            self._targets.write(slots[0].start, states)
            self._norms.write(slots[0].start, states.float().norm(dim=-1, keepdim=True))
            advance(len(slots))
        self._settle()

    def _settle(self) -> None:
        """Returns once every process's states can be read by all."""
        for file in (self._below, self._targets, self._norms):
            file.flush()
        self._processes.wait()

    def _passes(self, *, trained_only: bool) -> Iterator[tuple[torch.Tensor, list[Slot]]]:
        """Neighbouring slots and their token ids, so many at once as a pass should hold.

        Of several processes each has its share of the passes.
        """
        assert self._cache is not None
        rank, count = self._processes.rank, self._processes.count
        ids: list[int] = []
        slots: list[Slot] = []
        number = 0
        for row, slot in self._cache.slots.items():
            if trained_only and slot.start >= self._cache.trained:
                break
            if slots and len(ids) + len(row) > self.pass_tokens:
                if number % count == rank:
                    yield torch.tensor(ids), slots
                ids, slots = [], []
                number += 1
            ids.extend(row)
            slots.append(slot)
        if slots and number % count == rank:
            yield torch.tensor(ids), slots

    def _layers(self, first: int, last: int) -> list[str]:
        return [f"{self._layout.layers}.{index}" for index in range(first, last + 1)]


@contextmanager
def _cut_off() -> Iterator[None]:
    """Families whose own code is not made for a part of their layers fail in many ways."""
    try:
        yield
    except (NotASegment, ExpungeError, OSError):
        raise
    except Exception as error:
        reason = f"its layers do not run on their own ({type(error).__name__})"
        raise NotASegment(reason) from error


@contextmanager
def read_in_turn(parts: Parts, layout: DecoderLayout) -> Iterator[None]:
    """Passes of the whole model in the body: a layer is in memory while a pass is in it."""
    if not parts.streamed:
        yield
        return
    names = module_names(parts.model, layout)
    outside = (*names.others, *names.head)
    layers = [f"{layout.layers}.{index}" for index in range(layout.count)]
    try:
        parts.load(*outside)
        with loaded_in_turn(parts, [names.embedding, *layers]):
            yield
    finally:
        parts.release(*outside)


@dataclass(frozen=True)
class ModuleNames:
    """The modules outside the list of layers, by what they are for."""

    embedding: str
    head: tuple[str, ...]
    others: tuple[str, ...]


def module_names(model: Any, layout: DecoderLayout) -> ModuleNames:
    """Names of what is outside the list of layers."""
    names = {module: name for name, module in model.named_modules()}
    embedding = names[model.get_input_embeddings()]
    base = model.base_model_prefix
    inner = [f"{base}.{child}" for child, _ in model.base_model.named_children()]
    outer = [child for child, _ in model.named_children() if child != base]
    others = tuple(name for name in inner if name not in (embedding, layout.layers))
    return ModuleNames(embedding, tuple(outer), others)
