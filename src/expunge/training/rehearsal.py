"""A run on tensors without content: its own code, phase by phase, under a meter of memory.

What runs is what `run` runs: the engine, the method's start, the loop with its optimiser, the
measurement of a candidate. Only the rows are fewer: of every kind of pass the largest of the run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from expunge.analysis.layers import LayerPass
from expunge.data.batches import Batch
from expunge.data.tokenization import Example
from expunge.methods.base import Context, OptimizerSpec, Terms
from expunge.methods.steering import TRAINED_LAYERS
from expunge.models.decoder import skeleton_of
from expunge.models.engine import CacheLayout, SegmentEngine, pass_tokens_on
from expunge.models.loading import CheckedModel
from expunge.models.packing import NotASegment, arranged_for
from expunge.models.parts import give_back_freed_memory, why_not_streamed
from expunge.training.largest import (
    Largest,
    largest_batches,
    longest,
    padded_tokens,
    pass_sizes,
    shortest,
    tokens,
)
from expunge.training.loop import Loop, LoopOptions
from expunge.training.metering import KEPT, Heap, Meter
from expunge.training.preparation import Prepared
from expunge.training.progress import Silent
from expunge.training.stand_ins import CPU_KINDS, PlannedKeeper, PlannedModel, PlannedStates
from expunge.training.unlearning import autocast_of, plan_cache
from expunge.training.validation import ValidationSet, measure

TRAINED = "trained weights, float32"
GRADIENTS = "gradients"
COMPILED = "products compiled for their shapes"
_PRODUCTS_KEPT = 1024
"""Most that oneDNN keeps (its default of ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""
_PRODUCTS_TRIED = 8


@dataclass(frozen=True)
class Peak:
    """Bytes by kind at the highest moment of a phase."""

    phase: str
    device: Mapping[str, int]
    """Of the memory that the model runs in."""
    cpu: Mapping[str, int]
    """Of CPU memory, where that is another."""


@dataclass(frozen=True)
class Rehearsal:
    """What a run takes."""

    path: str
    """segment, hooks or whole model."""
    why_whole: str | None
    """Why a method that could run its layers alone does not."""
    streamed: bool
    """Whether the model is read part by part."""
    peaks: Sequence[Peak]
    cache: CacheLayout | None
    state_bytes: int
    """Size on disk of a saved state."""
    result: Mapping[str, tuple[int, ...]]
    """Shapes of the changed weights."""


def rehearse(
    checked: CheckedModel,
    prepared: Prepared,
    dtype: torch.dtype,
    device_type: str,
    choosing: Prepared | None = None,
) -> Rehearsal:
    """Runs everything between the checks and the writing, on fake tensors.

    `choosing` is the same run before its layer was chosen, where it was left open.
    """
    meter = Meter(
        checked.config.get_text_config().vocab_size,
        accelerator=device_type == "cuda",
        in_cpu_memory=CPU_KINDS,
    )
    token = arranged_for.set(device_type)
    try:
        return _Rehearsal(checked, prepared, dtype, device_type, meter, choosing).run()
    finally:
        arranged_for.reset(token)


@functools.cache
def product_bytes() -> int:
    """Bytes that oneDNN keeps in the heap of every new shape of a bfloat16 product, measured here.

    Not the matrices' sizes count but the processor: 559 kB where AVX-512 has bfloat16 instructions,
    47 kB where it has none, nothing with AVX2. In float32 it is nothing anywhere.
    """
    process, width = psutil.Process(), 64
    matrix = torch.ones(width, width, dtype=torch.bfloat16)
    before = 0
    for rows in range(width, width + 1 + _PRODUCTS_TRIED):
        torch.mm(matrix.new_ones(rows, width), matrix)
        if rows == width:  # the first one sets the library up
            give_back_freed_memory()
            before = process.memory_info().rss
    give_back_freed_memory()
    return int(max(0, process.memory_info().rss - before) // _PRODUCTS_TRIED)


class _Rehearsal:
    def __init__(
        self,
        checked: CheckedModel,
        prepared: Prepared,
        dtype: torch.dtype,
        device_type: str,
        meter: Meter,
        choosing: Prepared | None,
    ) -> None:
        self._choosing = choosing
        self._checked, self._prepared, self._dtype = checked, prepared, dtype
        self._device_type, self._meter = device_type, meter
        self._peaks: list[Peak] = []
        compiles = device_type == "cpu" and dtype == torch.bfloat16
        self._product_bytes = product_bytes() if compiles else 0
        self._compiled = 0.0
        self._state_bytes = 0

    def run(self) -> Rehearsal:
        checked, prepared, meter = self._checked, self._prepared, self._meter
        layers = prepared.method.trained_layers(checked.layout)
        skeleton = skeleton_of(checked.config, trust_remote_code=checked.trust_remote_code)
        own_code = checked.trust_remote_code
        streamed = layers is not None and why_not_streamed(skeleton, own_code=own_code) is None
        model = PlannedModel(checked, self._dtype, meter)
        engine = cache = why = None
        limit = pass_tokens_on(self._device_type)
        packed = largest_batches(prepared, limit) if layers else None
        with meter.running():
            model.take_buffers()
            if not streamed:
                with self._phase("load"):
                    model.load_whole()
            if layers is not None:
                try:
                    with self._phase("check"):
                        if self._choosing is not None:
                            self._choose(self._choosing, model)
                        engine = self._engine(model, layers)
                except NotASegment as reason:
                    why = str(reason)
                    self._peaks.pop()
                    with self._phase("load"):
                        model.load_whole()
            if engine is not None and packed is not None:
                cache = plan_cache(prepared, checked.layout.width, self._dtype)
                filled = self._filled(cache, packed)
                with self._phase(
                    "fill", _ratio(_fill_sizes(cache, limit), _fill_sizes(filled, limit))
                ):
                    engine.fill(filled, Path(), _silent)
                shapes = self._unlearn(model, engine, packed)
            else:
                shapes = self._unlearn(model, None, largest_batches(prepared, None))
        path = "whole model" if layers is None else "hooks" if engine is None else "segment"
        return Rehearsal(path, why, model.streamed, self._peaks, cache, self._state_bytes, shapes)

    @contextmanager
    def _phase(self, name: str, of_sizes: float = 1, of_lengths: float = 1) -> Iterator[None]:
        """`of_sizes`: how many sizes of passes the run has for each that the body rehearses.

        `of_lengths` is the same for the lengths of rows, each of which attention is called with.
        """
        self._meter.begin()
        self._meter.compiled.clear()
        try:
            yield
        finally:
            device = dict(self._meter.peak(0))
            for (operation, *_), products in self._meter.compiled.items():
                times = of_lengths if "attention" in operation else of_sizes
                self._compiled = min(_PRODUCTS_KEPT, self._compiled + products * times)
            if self._product_bytes:
                device[COMPILED] = round(self._compiled * self._product_bytes)
                device[KEPT] = device.get(KEPT, 0) + round(Heap.HOLES * device[COMPILED])
            self._peaks.append(Peak(name, device, self._meter.peak(1)))

    def _engine(self, model: PlannedModel, layers: tuple[int, int]) -> SegmentEngine:
        prepared = self._prepared
        engine = SegmentEngine(
            model,
            self._checked.layout,
            *layers,
            autocast_of(model.device, self._dtype),
            measures=prepared.measures,
            state_file=lambda _path, tokens, width, dtype: PlannedStates(
                self._meter, tokens, width, dtype
            ),
        )
        engine.pass_tokens = pass_tokens_on(self._device_type)
        engine.check([*prepared.forget, *prepared.retain])
        return engine

    def _choose(self, choosing: Prepared, model: PlannedModel) -> None:
        """The largest passes of those that choose the layer."""
        LayerPass(
            model,
            self._checked.layout,
            choosing.forget,
            choosing.retain,
            TRAINED_LAYERS,
            seed=choosing.options.seed,
            autocast=autocast_of(model.device, self._dtype),
            pass_tokens=pass_tokens_on(self._device_type),
        ).run(_silent, largest_only=True)

    def _context(self, model: PlannedModel, engine: SegmentEngine | None) -> Context:
        prepared = self._prepared
        size = prepared.used["batch_size"]
        return Context(
            model=model.model,
            layout=self._checked.layout,
            forget=self._start_rows(),
            # Of random rows all: what the target says of each is kept.
            retain=[*longest(self._kinds()[0], size), *self._kinds()[1]],
            pad_id=prepared.pad_id,
            batch_size=size,
            seed=prepared.options.seed,
            device=torch.device("cpu"),
            autocast=autocast_of(torch.device("cpu"), self._dtype),
            progress=_silent,
            engine=engine,
            measures=prepared.measures,
        )

    def _unlearn(
        self, model: PlannedModel, engine: SegmentEngine | None, largest: Largest
    ) -> dict[str, tuple[int, ...]]:
        prepared, meter = self._prepared, self._meter
        context = self._context(model, engine)
        target = None
        packed = engine is not None
        if prepared.measures:
            with self._phase("measure", self._ratio_of(prepared.validation.sides, packed=packed)):
                target = measure(context, self._validation()).measured
        with self._phase(
            "start", self._ratio_of((prepared.forget, prepared.retain), packed=packed)
        ):
            objective = prepared.method.rehearsed().start(context)
            model.unmap()
        for parameter in objective.parameters.values():
            meter.name(parameter, TRAINED)
            parameter.register_post_accumulate_grad_hook(lambda p: meter.name(p.grad, GRADIENTS))
        parts = [[side.lengths for side in sides if side is not None] for sides in largest.parts]
        sizes = {size for sides in parts for size in pass_sizes(sides, packed=packed)}
        lengths = {length for sides in parts for side in sides for length in side}
        of_lengths = largest.row_lengths / len(lengths) if packed else largest.sizes / len(sizes)
        with self._phase("train", largest.sizes / len(sizes), of_lengths):
            rows = 2 if largest.accumulates else 1
            loop = Loop(
                _OnLargest(objective, largest, accelerator=self._device_type == "cuda"),
                dataclasses.replace(
                    context,
                    forget=shortest(prepared.forget, rows),
                    retain=[row for side in self._kinds() for row in shortest(side, rows)],
                ),
                self._validation(),
                target,
                LoopOptions(
                    # The optimiser's state is made in the first step.
                    steps=2 * len(largest.parts),
                    steps_per_epoch=1,
                    learning_rate=prepared.used["learning_rate"],
                    schedule="constant",
                    max_grad_norm=1.0,
                    validate_every=1 if prepared.measures else None,
                    select=prepared.used["select"],
                    deadline=None,
                    micro_batch_size=1 if largest.accumulates else None,
                ),
                PlannedKeeper(meter, self._saved),
                Silent(),
                # Every state that could be saved names the optimiser's tensors.
                lambda _: loop.save(),
            )
            loop.save()
            loop.run()
        with self._phase("finish"):
            finished = objective.finish(keep_adapter=False)
        return {name: tuple(tensor.shape) for name, tensor in finished.weights.items()}

    def _kinds(self) -> list[list[Example]]:
        """Retain rows of the user's and random ones: a step has some of each, however long they are."""
        retain = self._prepared.retain
        return [[row for row in retain if row.listed is listed] for listed in (True, False)]

    def _saved(self, size: int) -> None:
        self._state_bytes = max(self._state_bytes, size)

    def _ratio_of(self, sides: Sequence[Sequence[Example]], *, packed: bool) -> float:
        """Sizes of passes over all rows, longest first, for one of the first passes over each side."""
        step = self._prepared.used["batch_size"]
        found: list[set[tuple[int, ...]]] = [set(), set()]
        for side in sides:
            ordered = sorted(map(len, side), reverse=True)
            for start in range(0, len(ordered), step):
                size = pass_sizes([ordered[start : start + step]], packed=packed)
                found[0] |= size
                found[1] |= size if start == 0 else set()
        return _ratio(*found)

    def _start_rows(self) -> list[Example]:
        """A start is given the longest rows, as many as are in one pass, and one of every task.

        And one of another document, where there are several: a method may set them against each other.
        """
        rows = self._prepared.forget
        one_of_each = {example.task: example for example in rows}.values()
        chosen = [*longest(rows, self._prepared.used["batch_size"]), *one_of_each]
        documents = {example.document for example in chosen}
        others = (example for example in rows if example.document not in documents)
        return chosen if len(documents) > 1 else [*chosen, *islice(others, 1)]

    def _validation(self) -> ValidationSet:
        size = self._prepared.used["batch_size"]
        forget, retain, nonmembers = (
            longest(rows, size) for rows in self._prepared.validation.sides
        )
        # Every row of the first side counts as a document: what is compared takes no more of each.
        members = forget if self._prepared.validation.members else ()
        return ValidationSet(forget, retain, members, nonmembers, self._prepared.validation.tokens)

    def _filled(self, cache: CacheLayout, largest: Largest) -> CacheLayout:
        """The layout with the rows that are needed here, and those of the largest passes of a fill."""
        needed: list[Sequence[Example]] = [
            *self._validation().sides,
            self._start_rows(),
            shortest(self._prepared.forget, 2),
            shortest(self._prepared.retain, 2),
        ]
        needed += [side.examples for sides in largest.parts for side in sides if side is not None]
        chosen = {example.input_ids for examples in needed for example in examples}
        passes = _fill_passes(cache, pass_tokens_on(self._device_type))
        for size in (tokens, padded_tokens) if passes else ():
            chosen |= set(max(passes, key=lambda rows: size([len(ids) for ids in rows])))
        slots = {ids: slot for ids, slot in cache.slots.items() if ids in chosen}
        return dataclasses.replace(cache, slots=slots)


class _OnLargest:
    """An objective that is given the largest batches in turn, whatever the loop gives it."""

    def __init__(self, objective: Any, largest: Largest, *, accelerator: bool) -> None:
        self._objective, self._largest = objective, largest
        self._calls = 0
        spec: OptimizerSpec = objective.optimizer
        if spec.name == "adamw" and accelerator:
            # PyTorch's choice on a GPU: all parameters in one go, with temporaries of all of them.
            spec = dataclasses.replace(spec, options={**spec.options, "foreach": True})
        self.optimizer = spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def loss(self, _forget: Batch, _retain: Batch | None) -> Terms:
        """Every batch serves for two steps."""
        calls = 4 if self._largest.accumulates else 2
        forget, retain = self._largest.parts[self._calls // calls % len(self._largest.parts)]
        self._calls += 1
        return self._objective.loss(forget, retain)

    def curvature(self, _batch: Batch) -> list[torch.Tensor]:
        """Of a whole batch: it is not cut."""
        return self._objective.curvature(self._largest.retain)


def _silent(_phase: str, _done: int, _total: int) -> None:
    pass


def _fill_passes(cache: CacheLayout, limit: int) -> list[list[tuple[int, ...]]]:
    """The rows of every pass of a fill, by their ids."""
    passes: list[list[tuple[int, ...]]] = []
    filled = 0
    for ids in cache.slots:
        if not passes or filled + len(ids) > limit:
            passes.append([])
            filled = 0
        passes[-1].append(ids)
        filled += len(ids)
    return passes


def _fill_sizes(cache: CacheLayout, limit: int) -> set[tuple[int, ...]]:
    return {(sum(map(len, rows)),) for rows in _fill_passes(cache, limit)}


def _ratio(whole: Collection[object], part: Collection[object]) -> float:
    return len(whole) / len(part) if part else 1.0
