"""The segment engine: what it keeps, what it loads, and that it gives what the whole model gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import FAMILIES, random_examples, shaken, tiny_model
from expunge.data.batches import Batch, collate
from expunge.data.tokenization import Example
from expunge.errors import RunError
from expunge.models.decoder import find_layout
from expunge.models.kernels import autocast_of
from expunge.models.loading import CheckedModel, check_model, load_model
from expunge.models.parts import Parts, StreamedModel, WholeModel
from expunge.models.weights import train_only
from expunge.processes import OneProcess
from expunge.segments import engine as engine_module
from expunge.segments import packing
from expunge.segments.cache_layout import CacheLayout, lay_out
from expunge.segments.engine import SegmentEngine
from expunge.segments.packing import NotASegment
from expunge.segments.segment import Segment, relative_error

WIDTH, LAYERS = 16, 4
CPU = torch.device("cpu")
DTYPES: tuple[Any, ...] = ("float32", "bfloat16")
# Sums in another order; bfloat16 has 8 bits and each layer adds a few roundings.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def silent(_name: str, _done: int, _total: int) -> None:
    pass


# ---------------------------------------------------------------- the layout of the cache


def spans(layout: CacheLayout) -> list[tuple[int, int]]:
    return [(slot.start, slot.start + slot.length) for slot in layout.slots.values()]


def test_equal_rows_share_a_slot_whatever_they_are_called() -> None:
    one, two = random_examples([5, 7], 300)
    twin = Example("other", "task", one.input_ids, two.token_mask[:5], two.answer_mask[:5])
    layout = lay_out([one, two, twin], [twin, two], WIDTH, torch.float32, None)
    assert len(layout.slots) == 2
    assert (layout.tokens, layout.trained, layout.missing) == (12, 12, 0)


def test_trained_rows_come_before_measured_ones() -> None:
    trained, measured = random_examples([5, 7], 300), random_examples([3, 4, 6], 300, seed=1)
    layout = lay_out(trained, [*measured, trained[0]], WIDTH, torch.float32, None)
    assert [layout.slots[example.input_ids].span for example in [*trained, *measured]] == [
        (0, 5), (5, 7), (12, 3), (15, 4), (19, 6),
    ]  # fmt: skip
    assert (layout.trained, layout.tokens) == (12, 25)


def test_the_size_is_that_of_states_targets_and_norms() -> None:
    trained, measured = random_examples([5, 7], 300), random_examples([3], 300, seed=1)
    layout = lay_out(trained, measured, WIDTH, torch.bfloat16, None)
    assert layout.bytes == 15 * WIDTH * 2 + 12 * WIDTH * 2 + 12 * 4
    assert lay_out([], [], WIDTH, torch.float32, None).bytes == 0


def test_a_limit_is_met_to_the_byte() -> None:
    trained, measured = random_examples([5, 7], 300), random_examples([3], 300, seed=1)
    whole = lay_out(trained, measured, WIDTH, torch.float32, None)
    assert lay_out(trained, measured, WIDTH, torch.float32, whole.bytes) == whole
    less = lay_out(trained, measured, WIDTH, torch.float32, whole.bytes - 1)
    assert (len(less.slots), less.missing) == (2, 1)
    assert measured[0].input_ids not in less.slots


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_rows_the_limit_is_kept_and_slots_do_not_overlap(seed: int) -> None:
    draw = random.Random(seed)
    # A vocabulary of two tokens makes equal rows.
    rows = random_examples([draw.randrange(1, 9) for _ in range(60)], 4, seed=seed)
    trained, measured = rows[:35], rows[30:]
    dtype = draw.choice([torch.float32, torch.bfloat16])
    whole = lay_out(trained, measured, WIDTH, dtype, None)
    limit = draw.uniform(0, 1.2) * whole.bytes
    layout = lay_out(trained, measured, WIDTH, dtype, limit)
    assert layout.bytes <= limit
    distinct = {example.input_ids for example in rows}
    assert len(layout.slots) + layout.missing == len(distinct)
    assert set(layout.slots) <= distinct
    # Slots are one after the other, in the order of the mapping, as long as their rows.
    assert [start for start, _ in spans(layout)] == [0, *(end for _, end in spans(layout))][:-1]
    assert layout.tokens == sum(map(len, layout.slots))
    assert all(slot.length == len(ids) for ids, slot in layout.slots.items())
    in_training = {example.input_ids for example in trained}
    assert layout.trained == sum(len(ids) for ids in layout.slots if ids in in_training)
    for ids, slot in layout.slots.items():
        assert (slot.start + slot.length <= layout.trained) == (ids in in_training)
    # What is missing would not have fitted in what is left.
    left = limit - layout.bytes
    for ids in distinct - set(layout.slots):
        assert (
            len(ids) * WIDTH * dtype.itemsize * (1 + (ids in in_training))
            + 4 * len(ids) * (ids in in_training)
            > left
        )


def test_a_limit_of_nothing_keeps_nothing() -> None:
    layout = lay_out(random_examples([5, 7], 300), random_examples([3], 300), WIDTH, torch.float32, 0)
    assert (layout.slots, layout.tokens, layout.missing, layout.bytes) == ({}, 0, 3, 0)


# ---------------------------------------------------------------- against the whole model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], CheckedModel]:
    """A checked model whose layers, neighbours and positions all matter."""
    made: dict[str, CheckedModel] = {}

    def checked(family: str = "olmo") -> CheckedModel:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            shaken(tiny_model(family, 300, layers=LAYERS)).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family] = check_model(str(path))
        return made[family]

    return checked


TRAINED = random_examples([9, 4, 13, 1, 6, 2], 300)
MEASURED = [*random_examples([8, 3], 300, seed=1), TRAINED[2]]
BATCHES = ([0, 1, 2], [3], [5, 4, 0])


def parts_of(checked: CheckedModel, dtype: Any, *, streamed: bool) -> Parts:
    if streamed:
        return StreamedModel(checked, getattr(torch, dtype), "cpu")
    return WholeModel(load_model(checked, dtype, "cpu").requires_grad_(False))


def opened(
    checked: CheckedModel,
    directory: Path,
    layers: tuple[int, int] = (1, 3),
    dtype: Any = "float32",
    *,
    streamed: bool = False,
    measures: bool = True,
    limit: float | None = None,
    cache_dtype: torch.dtype | None = None,
    pass_tokens: int = 20,
) -> tuple[SegmentEngine, Parts, CacheLayout]:
    """An engine, filled; passes are so small that the fill takes several."""
    parts = parts_of(checked, dtype, streamed=streamed)
    of_model = getattr(torch, dtype)
    engine = SegmentEngine(parts, checked.layout, *layers, autocast_of(CPU, of_model), measures=measures)
    engine.pass_tokens = pass_tokens
    engine.check(TRAINED)
    cache = lay_out(TRAINED, MEASURED if measures else [], WIDTH, cache_dtype or of_model, limit)
    engine.fill(cache, directory, silent)
    return engine, parts, cache


def trained_weights(parts: Parts, engine_layers: tuple[int, int]) -> dict[str, nn.Parameter]:
    """float32 masters of the segment's projections, as a method makes them."""
    layout = find_layout(parts.model)
    first, last = engine_layers
    return train_only(parts.model, [layout.mlp_output_weight(index) for index in range(first, last + 1)])


def disturb(weights: Mapping[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)


class Reference:
    """A plain model of its own, in which the same weights are trained; a pass for every row."""

    def __init__(self, checked: CheckedModel, layers: tuple[int, int], dtype: Any) -> None:
        self.model = load_model(checked, dtype, "cpu")
        self.weights = trained_weights(WholeModel(self.model), layers)
        self._layer = checked.layout.layer(self.model, layers[1])
        self._autocast = autocast_of(CPU, getattr(torch, dtype))

    def rows(self, examples: Sequence[Example]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Output of the last trained layer and logits, for each row."""
        found = []
        for example in examples:
            caught: list[torch.Tensor] = []
            handle = self._layer.register_forward_hook(
                lambda _m, _i, output, caught=caught: caught.append(output)
            )
            with self._autocast():
                logits = self.model(input_ids=torch.tensor([example.input_ids])).logits[0]
            handle.remove()
            found.append((caught[0][0], logits))
        return found

    def states(self, batch: Batch) -> torch.Tensor:
        return torch.cat([states for states, _ in self.rows(batch.examples)])


def batches(examples: Sequence[Example], chosen: Sequence[Sequence[int]]) -> list[Batch]:
    return [collate(examples, indices, 1) for indices in chosen]


def assert_as_the_whole_model(
    engine: SegmentEngine,
    parts: Parts,
    checked: CheckedModel,
    layers: tuple[int, int],
    dtype: Any,
    tolerance: float,
) -> None:
    """now, before, norms_before and next_tokens, before and after the weights have changed."""
    reference = Reference(checked, layers, dtype)
    weights = trained_weights(parts, layers)
    engine.freeze(weights)
    given = batches(TRAINED, BATCHES)
    with torch.no_grad():
        before = [reference.states(batch) for batch in given]
    for changed in (False, True):
        if changed:
            disturb(weights)
            disturb(reference.weights)
        with autocast_of(CPU, getattr(torch, dtype))():
            now = engine.now(*given)
            assert len(now) == len(given)
            for batch, states, old in zip(given, now, before, strict=True):
                expected = reference.states(batch).detach()
                assert states.shape == expected.shape
                assert states.requires_grad
                assert relative_error(states.detach(), expected) < tolerance
                assert relative_error(engine.before(batch), old) < tolerance
                norms = engine.norms_before(batch)
                assert norms.dtype == torch.float32
                assert relative_error(norms, old.float().norm(dim=-1)) < tolerance
                assert not engine.before(batch).requires_grad
                if changed:
                    assert relative_error(expected, old) > 10 * tolerance
        if engine._measures:
            assert_next_tokens(engine, reference, dtype, tolerance)
    direction = torch.randn(now[0].shape, generator=torch.Generator().manual_seed(3))
    (now[0].float() * direction).sum().backward()
    (reference.states(given[0]).float() * direction).sum().backward()
    for name, weight in weights.items():
        gradient = reference.weights[name].grad
        assert weight.grad is not None
        assert gradient is not None
        assert relative_error(weight.grad, gradient) < 3 * tolerance


def assert_next_tokens(
    engine: SegmentEngine, reference: Reference, dtype: Any, tolerance: float
) -> None:
    (batch,) = batches([*TRAINED, *MEASURED], [range(len(TRAINED) + len(MEASURED))])
    with torch.no_grad(), autocast_of(CPU, getattr(torch, dtype))():
        log_probs, right = engine.next_tokens(batch)
        rows = [logits for _, logits in reference.rows(batch.examples)]
    assert log_probs.shape == right.shape == (len(rows), batch.input_ids.shape[1] - 1)
    for row, logits in enumerate(rows):
        ids = torch.tensor(batch.examples[row].input_ids)
        count = len(ids) - 1
        scores = logits.float().log_softmax(-1)
        expected = torch.stack([scores[i, ids[i + 1]] for i in range(count)] or [torch.zeros(())])
        found = log_probs[row, :count]
        if count:
            scale = float(logits.float().abs().max())
            assert float((found - expected).abs().max()) < 3 * tolerance * scale
        best = [int(logits[i].argmax()) == int(ids[i + 1]) for i in range(count)]
        if dtype == "float32":
            assert right[row, :count].tolist() == best
    assert not log_probs.isnan().any()


LAYER_PAIRS = pytest.mark.parametrize("layers", [(0, 2), (1, 3), (2, 2)])


@LAYER_PAIRS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_engine_gives_what_the_whole_model_gives(
    streamed: bool,
    dtype: Any,
    layers: tuple[int, int],
    saved: Callable[..., CheckedModel],
    tmp_path: Path,
) -> None:
    checked = saved()
    engine, parts, _ = opened(checked, tmp_path, layers, dtype, streamed=streamed)
    assert_as_the_whole_model(engine, parts, checked, layers, dtype, TOLERANCE[dtype])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "olmo"])
def test_the_engine_works_on_every_family(
    family: str, saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    checked = saved(family)
    engine, parts, _ = opened(checked, tmp_path, (2, 3), streamed=True)
    assert_as_the_whole_model(engine, parts, checked, (2, 3), "float32", TOLERANCE["float32"])


def test_the_engine_works_where_residuals_are_parallel(tmp_path: Path) -> None:
    model = shaken(tiny_model("gpt_neox", 300))
    layout = find_layout(model)
    engine = SegmentEngine(
        WholeModel(model), layout, 1, 2, autocast_of(CPU, torch.float32), measures=True
    )
    errors = engine.check(TRAINED)
    assert set(errors) == {"below", "states", "logits"}
    assert max(errors.values()) < 1e-5


@LAYER_PAIRS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("share", [0, 0.5])
def test_rows_beyond_the_limit_are_computed_each_time(
    share: float,
    streamed: bool,
    dtype: Any,
    layers: tuple[int, int],
    saved: Callable[..., CheckedModel],
    tmp_path: Path,
) -> None:
    checked = saved()
    whole = lay_out(TRAINED, MEASURED, WIDTH, getattr(torch, dtype), None)
    engine, parts, cache = opened(
        checked, tmp_path, layers, dtype, streamed=streamed, limit=share * whole.bytes
    )
    assert cache.missing >= 3
    assert bool(cache.slots) == bool(share)
    assert_as_the_whole_model(engine, parts, checked, layers, dtype, TOLERANCE[dtype])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "tolerance"),
    [
        # One rounding to 8 bits of what goes in, and one of the targets.
        ("float32", torch.bfloat16, 2e-2),
        # Nothing is lost in the wider file.
        ("bfloat16", torch.float32, TOLERANCE["bfloat16"]),
    ],
)
def test_the_cache_may_have_another_dtype(
    dtype: Any,
    cache_dtype: torch.dtype,
    tolerance: float,
    streamed: bool,
    saved: Callable[..., CheckedModel],
    tmp_path: Path,
) -> None:
    checked = saved()
    engine, parts, cache = opened(
        checked, tmp_path, (2, 3), dtype, streamed=streamed, cache_dtype=cache_dtype
    )
    size = (tmp_path / "below").stat().st_size
    assert size == cache.tokens * WIDTH * cache_dtype.itemsize
    assert_as_the_whole_model(engine, parts, checked, (2, 3), dtype, tolerance)


def test_a_narrower_cache_rounds_once_and_not_between_groups_of_layers(
    saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    """Streamed with one layer in memory at a time, states would pass through the file each time."""
    engine, *_ = opened(
        saved(), tmp_path, (3, 3), streamed=True, cache_dtype=torch.bfloat16, measures=False
    )
    exact = Reference(saved(), (2, 2), "float32")
    with torch.no_grad():
        expected = torch.cat([states for states, _ in exact.rows(TRAINED)])
    found = engine._below.read([slot.span for slot in engine._cache.slots.values()])  # type: ignore[union-attr]
    # Rounding to nearest: half a unit in the last of 8 bits, and float32's own noise.
    assert float(((found.float() - expected).abs() / expected.abs()).max()) < 2**-8


@pytest.mark.parametrize("streamed", [False, True])
def test_the_size_of_a_pass_does_not_change_what_is_cached(
    streamed: bool, saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    contents = []
    for pass_tokens in (1, 10, 10_000):
        directory = tmp_path / str(pass_tokens)
        directory.mkdir()
        engine, *_ = opened(saved(), directory, streamed=streamed, pass_tokens=pass_tokens)
        contents.append(engine._below.read([(0, 46)]))
        contents.append(engine._targets.read([(0, 35)]))
    for below, targets in zip(contents[2::2], contents[3::2], strict=True):
        torch.testing.assert_close(below, contents[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(targets, contents[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("measures", [False, True])
def test_the_size_on_disk_is_the_size_that_was_told(
    measures: bool, streamed: bool, saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    _, _, cache = opened(saved(), tmp_path, streamed=streamed, measures=measures)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == cache.bytes


class Share(OneProcess):
    """One of several processes, none of which waits for another."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


@pytest.mark.parametrize("count", [2, 3, 9])
def test_several_processes_fill_one_cache(
    count: int, saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    """Each a part of the rows, from layer to layer the same ones, so that none has to wait."""
    checked = saved()
    opened(checked, tmp_path)
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shared = tmp_path / "shared"
    shared.mkdir()
    for rank in range(count):
        before = {path.name: path.read_bytes() for path in shared.iterdir()}
        parts = parts_of(checked, "float32", streamed=True)
        engine = SegmentEngine(
            parts,
            checked.layout,
            *(1, 3),
            autocast_of(CPU, torch.float32),
            measures=True,
            processes=Share(rank, count),
        )
        engine.pass_tokens = 20
        engine.check(TRAINED)
        engine.fill(lay_out(TRAINED, MEASURED, WIDTH, torch.float32, None), shared, silent)
        filled = {path.name: path.read_bytes() for path in shared.iterdir()}
        assert (filled != before) == (rank < 3)  # three passes, whatever the processes
        assert (filled == expected) == (rank >= min(count, 3) - 1)


# ---------------------------------------------------------------- a fill that was done before


@pytest.mark.parametrize("share", [1, 0.5])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_filled_cache_is_used_without_running_what_is_below(
    streamed: bool,
    share: float,
    saved: Callable[..., CheckedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = saved()
    limit = share * lay_out(TRAINED, MEASURED, WIDTH, torch.float32, None).bytes
    _, _, cache = opened(checked, tmp_path, streamed=streamed, limit=limit)
    parts = parts_of(checked, "float32", streamed=streamed)
    engine = SegmentEngine(parts, checked.layout, 1, 3, autocast_of(CPU, torch.float32), measures=True)
    engine.check(TRAINED)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise AssertionError

        for way in ("from_ids", "__call__", "logits"):
            patch.setattr(Segment, way, fail)
        engine.fill(cache, tmp_path, silent, filled=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert_as_the_whole_model(engine, parts, checked, (1, 3), "float32", TOLERANCE["float32"])


# ---------------------------------------------------------------- what is in memory


def in_memory(parts: Parts) -> set[str]:
    """The layers and other children of the model that have a parameter in memory."""
    return {
        ".".join(name.split(".")[: 3 if "layers" in name else 2])
        for name, parameter in parts.model.named_parameters(remove_duplicate=False)
        if not parameter.is_meta
    }


class Watched(StreamedModel):
    """Notes every module that is loaded, and the most layers that were in memory at once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.loaded: list[str] = []
        self.most = 0

    def load(self, *modules: str) -> None:
        super().load(*modules)
        self.loaded.extend(modules)
        self.most = max(self.most, sum("layers" in name for name in in_memory(self)))


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("measures", [False, True])
def test_only_what_an_epoch_needs_stays_in_memory(
    measures: bool, limit: float | None, saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    checked = saved("llama")  # the only family here whose norms have weights
    parts = Watched(checked, torch.float32, "cpu")
    engine = SegmentEngine(
        parts, checked.layout, 1, 2, autocast_of(CPU, torch.float32), measures=measures
    )
    engine.check(TRAINED)
    assert not [name for name in in_memory(parts) if "layers" in name or "embed" in name]
    assert ("model.layers.3" in parts.loaded) == measures
    assert parts.most == 1
    parts.loaded.clear()
    engine.fill(lay_out(TRAINED, [], WIDTH, torch.float32, limit), tmp_path, silent)
    needed = {"model.layers.1", "model.layers.2"}
    if measures:
        needed |= {"model.layers.3", "lm_head.weight"}
    if limit == 0:
        needed |= {"model.embed_tokens", "model.layers.0"}
    assert in_memory(parts) - {"model.norm"} == needed
    assert ("model.layers.3" in parts.loaded) == measures


def test_a_fill_has_as_many_layers_in_memory_as_a_step(
    saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    parts = Watched(saved(), torch.float32, "cpu")
    engine = SegmentEngine(parts, saved().layout, 3, 3, autocast_of(CPU, torch.float32), measures=False)
    engine.check(TRAINED)
    parts.loaded.clear()
    engine.fill(lay_out(TRAINED, [], WIDTH, torch.float32, None), tmp_path, silent)
    assert parts.most == 1
    assert parts.loaded == [
        "model.layers.0",
        "model.embed_tokens",
        "model.layers.1",
        "model.layers.2",
        "model.layers.3",
    ]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("layers", [(0, 2), (3, 3)])
def test_the_progress_of_a_fill_ends_when_it_is_done(
    layers: tuple[int, int], streamed: bool, saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    parts = parts_of(saved(), "float32", streamed=streamed)
    engine = SegmentEngine(
        parts, saved().layout, *layers, autocast_of(CPU, torch.float32), measures=True
    )
    engine.pass_tokens = 10
    engine.check(TRAINED)
    told: list[tuple[str, int, int]] = []
    engine.fill(
        lay_out(TRAINED, MEASURED, WIDTH, torch.float32, None),
        tmp_path,
        lambda name, done, total: told.append((name, done, total)),
    )
    assert len({(name, total) for name, _, total in told}) == 1
    counts = [done for _, done, _ in told]
    assert counts == sorted(set(counts))
    assert counts[-1] == told[-1][2]


# ---------------------------------------------------------------- models that cannot be cut


def engine_on(model: Any, first: int, last: int, *, measures: bool = True) -> SegmentEngine:
    return SegmentEngine(
        WholeModel(model),
        find_layout(model),
        first,
        last,
        autocast_of(CPU, model.dtype),
        measures=measures,
    )


@pytest.mark.parametrize("measures", [False, True])
def test_absolute_positions_are_found_out(measures: bool) -> None:
    with pytest.raises(NotASegment, match="differ from the whole model"):
        engine_on(shaken(tiny_model("gpt2", 300)), 1, 3, measures=measures).check(TRAINED)
    # As saved by its makers too, where the embeddings are small.
    with pytest.raises(NotASegment, match="states by"):
        engine_on(tiny_model("gpt2", 300), 1, 3, measures=measures).check(TRAINED)
    # Above the embeddings nothing is added twice.
    assert engine_on(shaken(tiny_model("gpt2", 300)), 0, 2).check(TRAINED)


@pytest.mark.parametrize("family", ["bloom", "xglm"])
def test_a_family_whose_code_cannot_run_a_part_of_its_layers_is_found_out(family: str) -> None:
    """BLOOM wants masks of two dimensions, XGLM checks theirs."""
    with pytest.raises(NotASegment, match=r"do not run on their own \(ValueError\)"):
        engine_on(shaken(tiny_model(family, 300)), 1, 3).check(TRAINED)


@pytest.mark.parametrize("error", [RunError("a file"), OSError("a disk")])
def test_what_goes_wrong_with_files_is_not_taken_for_the_models_fault(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(shaken(tiny_model("olmo", 300)), 1, 2)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Segment, "__call__", fail)
    with pytest.raises(type(error), match=str(error)):
        engine.check(TRAINED)


def test_attention_that_would_mix_packed_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a family which does not ask transformers for it."""

    def mixed(q: Any, k: Any, v: Any, _lengths: Any, scaling: Any, _window: Any) -> torch.Tensor:
        return packing._causal(q, k, v, scaling, q.shape[2])

    monkeypatch.setattr(packing, "_row_by_row", mixed)
    engine = engine_on(shaken(tiny_model("olmo", 300)), 1, 3)
    with pytest.raises(NotASegment, match="below by"):
        engine.check(TRAINED)


def test_soft_capped_attention_is_found_out_and_nothing_stays_loaded(
    tmp_path: Path, tokenizer: Any
) -> None:
    tiny_model("gemma2", 300).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    checked = check_model(str(tmp_path))
    parts = StreamedModel(checked, torch.float32, "cpu")
    engine = SegmentEngine(parts, checked.layout, 1, 3, autocast_of(CPU, torch.float32), measures=False)
    with pytest.raises(NotASegment, match="soft capping"):
        engine.check(TRAINED)
    assert not [name for name in in_memory(parts) if "layers" in name or "embed" in name]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in parts.model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["below", "states", "logits"])
def test_a_segment_that_is_wrong_anywhere_is_found_out(
    what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(shaken(tiny_model("olmo", 300)).to(dtype), 1, 2)
    assert set(engine.check(TRAINED)) == {"below", "states", "logits"}
    way = {"below": "from_ids", "states": "__call__", "logits": "logits"}[what]
    original = getattr(Segment, way)
    error = 2 * engine_module._TOLERANCE[dtype]
    monkeypatch.setattr(Segment, way, lambda self, *given: (1 + error) * original(self, *given).float())
    with pytest.raises(NotASegment, match=rf"whole model \({what} by \d\.\de-0\d\)$"):
        engine.check(TRAINED)


def test_values_that_are_not_numbers_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_on(shaken(tiny_model("olmo", 300)), 1, 2)
    monkeypatch.setattr(Segment, "__call__", lambda _self, states, _lengths: states * torch.nan)
    with pytest.raises(NotASegment, match="states by nan"):
        engine.check(TRAINED)


def test_the_check_looks_at_a_short_a_middle_and_a_long_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A window shows in the long ones only, and rows that are mixed in all but the first."""
    engine = engine_on(shaken(tiny_model("olmo", 300)), 1, 2)
    seen: list[Sequence[int]] = []
    original = Segment.__call__

    def note(self: Segment, states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        seen.append(lengths)
        return original(self, states, lengths)

    monkeypatch.setattr(Segment, "__call__", note)
    engine.check(TRAINED)
    engine.check(TRAINED[:1])
    assert seen == [[1, 6, 13], [9, 9, 9]]


def test_rows_that_were_never_laid_out_are_refused(
    saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    engine, *_ = opened(saved(), tmp_path)
    (stranger,) = batches(random_examples([5], 300, seed=8), [[0]])
    with pytest.raises(AssertionError, match="not laid out"):
        engine.now(stranger)


@pytest.mark.parametrize("limit", [None, 0])
def test_several_batches_in_one_pass_are_what_they_are_in_passes_of_their_own(
    limit: float | None, saved: Callable[..., CheckedModel], tmp_path: Path
) -> None:
    engine, *_ = opened(saved(), tmp_path, limit=limit)
    given = batches(TRAINED, BATCHES)
    with torch.no_grad():
        for together, batch in zip(engine.now(*given), given, strict=True):
            torch.testing.assert_close(together, engine.now(batch)[0], rtol=1e-4, atol=1e-5)
