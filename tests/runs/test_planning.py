"""The plan of a run: its parts add up, move the way they must, and need no weights."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_examples, refusal, tiny_model
from expunge.data import random_text
from expunge.data.sampling import step_batches
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.base import generator_of
from expunge.methods.catalog import METHODS
from expunge.methods.gradient_difference import GradientDifference
from expunge.methods.idk_dpo import IDKDPO
from expunge.methods.kl_minimization import KLMinimization
from expunge.methods.libu import LIBU
from expunge.methods.npo import NPO
from expunge.methods.retrain import Retrain
from expunge.methods.sam_npo import SamNPO
from expunge.methods.spectral import Spectral
from expunge.methods.undial import UNDIAL
from expunge.models.decoder import find_layout
from expunge.models.weights import train_only
from expunge.runs.memory_parts import (
    ACTIVATIONS,
    CASTS,
    CONTEXT,
    COPIES,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    PAGES,
    PROCESS,
    PRODUCTS,
    REFERENCE,
    TRAINED,
    WEIGHTS,
)
from expunge.runs.planning import GIB, Budget, Plan, alternatives, budget_of, plan
from expunge.runs.run import RunInputs, check_run
from expunge.runs.sizes import largest_batches
from expunge.training.options import TrainingOptions, resolved

CPU = Budget("a machine", 64 * GIB, "cpu")
GPU = Budget("a GPU", 64 * GIB, "cuda")
WIDTH, INNER, LAYERS = 16, 32, 4
MATRIX = 4 * WIDTH * INNER
"""Bytes of one of the tiny model's MLP matrices in float32."""


@pytest.fixture
def checked(model_dir: Callable[[str], Path], row_files: dict[str, Path]) -> Callable[..., Any]:
    """The checked model and the prepared run of a method on the tiny model."""

    def make(method: Any, model: Path | None = None, **options: Any) -> Any:
        inputs = RunInputs(
            str(model or model_dir("olmo")),
            str(row_files["forget"]),
            "",
            str(row_files["retain"]),
            str(row_files["nonmembers"]),
        )
        if isinstance(method, Retrain):
            inputs = dataclasses.replace(inputs, base=inputs.model)
        settings = TrainingOptions(**{"batch_size": 2, "max_steps": 4, **options})
        model_files, _, prepared = check_run(inputs, method, settings, writes=False)
        return model_files, prepared

    return make


@pytest.fixture
def planned(checked: Callable[..., Any]) -> Callable[..., Plan]:
    """The plan of a method, in float32 on a processor unless told otherwise."""

    def make(
        method: Any,
        dtype: str = "float32",
        budget: Budget = CPU,
        model: Path | None = None,
        shards: int = 1,
        **options: Any,
    ) -> Plan:
        given = checked(method, model, **options)
        return plan(given[0], given[1], dtype, budget, shards)

    return make


@pytest.fixture
def planned_evenly(checked: Callable[..., Any]) -> Callable[..., Plan]:
    """The plan of a method whose rows all have 20 tokens."""

    def make(method: Any, dtype: str = "float32", rows: int = 2, shards: int = 1, **more: Any) -> Plan:
        model, prepared = checked(method, select="last", batch_size=rows, **more)
        some = random_examples([20] * 16, 50)
        used = resolved(method, prepared.options, model.layout, len(some))
        even = dataclasses.replace(prepared, forget=some, retain=some, used=used)
        return plan(model, even, dtype, GPU, shards)

    return make


def part(found: Plan, kind: str, phase: str = "train") -> int:
    """Bytes of one part at the highest moment of a phase."""
    return next(p.parts for p in found.phases if p.name == phase).get(kind, 0)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_planned_and_its_parts_add_up(
    checked: Callable[..., Any], name: str
) -> None:
    given = checked(METHODS[name]())
    for budget in (CPU, GPU):
        found = plan(given[0], given[1], "float32", budget)
        shown = json.loads(json.dumps(found.to_json()))
        for phase in shown["phases"]:
            assert phase["bytes"] == sum(phase["parts"].values())
            assert phase["cpu_bytes"] == sum(phase["cpu_parts"].values())
            assert phase["parts" if budget is CPU else "cpu_parts"][PROCESS] > 0
            assert all(size > 0 for size in phase["parts"].values())
        assert shown["peak_bytes"] == max(phase["bytes"] for phase in shown["phases"])
        assert shown["fits"]
        steering = found.method in ("rmu", "adaptive-rmu")
        assert found.path == ("segment" if steering else "whole model")
        assert (found.cache_bytes > 0) == steering


@pytest.mark.parametrize("method", [NPO(), LIBU(random_rows=5)])
def test_the_largest_batches_are_those_of_the_run(
    checked: Callable[..., Any], method: NPO | LIBU
) -> None:
    _, prepared = checked(method, batch_size=3, max_steps=7, validation_fraction=0)
    forget, retain = step_batches(
        prepared.forget,
        prepared.retain,
        3,
        0,
        partial(generator_of, 0),
        method.sampling,
        7,
    )
    assert retain is not None
    sums = []
    for step in range(1, 8):
        rows = retain.at(step).examples
        kinds = [[e for e in rows if e.listed is listed] for listed in (True, False)]
        padded = [len(kind) * max(map(len, kind), default=0) for kind in kinds]
        sums.append(forget.at(step).input_ids.numel() + sum(padded))
    largest = largest_batches(prepared, None, 1)
    assert sum(batch.input_ids.numel() for batch in largest.batches) == max(sums)
    assert not largest.accumulates
    packed = largest_batches(prepared, 16, 1)
    assert packed.accumulates
    assert sum(sum(batch.lengths) for batch in packed.batches) < max(sums)


@pytest.mark.parametrize("family", ["olmo", "llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_the_formula_says(
    family: str, dtype: torch.dtype, planned_evenly: Callable[..., Plan], model_dir: Any
) -> None:
    """Against what autograd keeps of one more layer; casts of weights are counted apart.

    The constant is a mean over families: attention and norms keep more or less beside the maps.
    """
    kept, casts = (
        [after - before for before, after in zip(*sizes, strict=True)]
        for sizes in zip(*(_kept_for_backward(family, dtype, layers) for layers in (1, 2)), strict=True)
    )
    method = Spectral(lens_weight=0.0, retain_weight=0.0, random_rows=0)
    name = str(dtype).removeprefix("torch.")
    found = planned_evenly(method, name, model=model_dir(family))
    assert part(found, ACTIVATIONS) / (LAYERS + 1) == pytest.approx(kept[0], rel=0.25)
    assert part(found, CASTS) / LAYERS == pytest.approx(casts[0], abs=1)


def _kept_for_backward(family: str, dtype: torch.dtype, layers: int) -> tuple[tuple[int], tuple[int]]:
    """Bytes that a pass over 2 rows of 20 tokens keeps: activations, and weights that were cast."""
    model = tiny_model(family, 400, layers).to(dtype)
    names = [f"{name}.weight" for name in find_layout(model).linears()]
    trained = train_only(model, names)
    shapes = {tuple(p.shape) for p in trained.values()}
    shapes |= {shape[::-1] for shape in shapes}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, tuple[int, bool]] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held.append(tensor)  # so that no other takes its place
            seen[storage._cdata] = (storage.nbytes(), tuple(tensor.shape) in shapes)
        return tensor

    ids = torch.arange(40).view(2, 20)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False),
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    sums = [sum(size for size, cast in seen.values() if cast is kind) for kind in (False, True)]
    return (sums[0],), (sums[1],)


def test_twice_the_rows_are_twice_the_activations_and_logits(
    planned_evenly: Callable[..., Plan],
) -> None:
    for method in (Spectral(), LIBU(), GradientDifference(), KLMinimization()):
        small, large = (planned_evenly(method, rows=rows) for rows in (2, 4))
        for kind in (ACTIVATIONS, LOGITS):
            assert part(large, kind) == pytest.approx(2 * part(small, kind), rel=1e-6)
        for kind in (WEIGHTS, TRAINED, OPTIMIZER):
            assert part(large, kind) == part(small, kind)


def test_twice_the_layers_are_twice_what_layers_hold(
    planned_evenly: Callable[..., Plan], tokenizer: Any, tmp_path: Path
) -> None:
    plans = []
    for layers in (LAYERS, 2 * LAYERS):
        tiny_model("olmo", len(tokenizer), layers).save_pretrained(tmp_path / str(layers))
        tokenizer.save_pretrained(tmp_path / str(layers))
        method = Spectral(retain_weight=0.0, random_rows=0)
        plans.append(planned_evenly(method, model=tmp_path / str(layers)))
    small, large = plans
    for kind in (TRAINED, OPTIMIZER):
        assert part(large, kind) == 2 * part(small, kind)
    # One layer's temporaries are counted once.
    ratio = (2 * LAYERS + 1) / (LAYERS + 1)
    assert part(large, ACTIVATIONS) == pytest.approx(ratio * part(small, ACTIVATIONS), rel=1e-6)
    assert part(large, LOGITS) == part(small, LOGITS)


def test_shards_divide_what_is_trained_and_the_rows_of_a_step(
    planned_evenly: Callable[..., Plan],
) -> None:
    alone, shared = (planned_evenly(Spectral(), "bfloat16", rows=4, shards=shards) for shards in (1, 2))
    for kind in (TRAINED, OPTIMIZER):
        assert part(shared, kind) == part(alone, kind) / 2
    # Retain rows are 4, so that each process has 2 of each side.
    assert part(shared, ACTIVATIONS) == pytest.approx(part(alone, ACTIVATIONS) / 2, rel=1e-6)
    assert part(shared, CASTS) == 0 < part(alone, CASTS)
    adapters = [planned_evenly(LIBU(), "bfloat16", rows=4, shards=shards) for shards in (1, 2)]
    assert part(adapters[0], TRAINED) == part(adapters[1], TRAINED)


@pytest.mark.parametrize(("optimizer", "moments"), [("muon", 1), ("adamw", 2)])
def test_weights_gradients_and_optimiser_have_the_size_of_what_is_trained(
    optimizer: Any, moments: int, planned: Callable[..., Plan]
) -> None:
    found = planned(AdaptiveRMU(layer=3, optimizer=optimizer), select="last")
    # mlp.down_proj, and three layers have one
    assert part(found, TRAINED) == part(found, TRAINED, "finish") == 3 * MATRIX
    assert part(found, OPTIMIZER) == 3 * moments * MATRIX
    assert part(found, COPIES, "finish") == 3 * MATRIX
    assert found.state_bytes == 3 * (1 + moments) * MATRIX


def test_the_whole_matrices_of_the_layers_are_trained_in_float32(
    planned: Callable[..., Plan],
) -> None:
    every = LAYERS * 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    for dtype in ("float32", "bfloat16"):
        found = planned(Spectral(), dtype, GPU)
        assert part(found, TRAINED) == part(found, OPTIMIZER) == every
        assert part(found, GRADIENTS) < every  # each moves in the backward pass
        assert part(planned(Spectral(), dtype, GPU, micro_batch_size=1), GRADIENTS) == every
    assert part(planned(Spectral(targets="mlp")), TRAINED) == LAYERS * 3 * MATRIX


def test_half_the_bytes_a_number_are_half_the_weights(planned: Callable[..., Plan]) -> None:
    single, half = (planned(NPO(), dtype) for dtype in ("float32", "bfloat16"))
    assert part(half, WEIGHTS) == part(single, WEIGHTS) / 2
    assert part(half, TRAINED) == part(single, TRAINED)


def test_more_rows_in_a_pass_take_more_and_smaller_passes_less(
    planned: Callable[..., Plan],
) -> None:
    sizes = [part(planned(NPO(), batch_size=size), ACTIVATIONS) for size in (1, 2, 4)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    assert part(planned(NPO(), batch_size=4, micro_batch_size=1), ACTIVATIONS) < sizes[2]


def test_recomputing_activations_and_training_less_take_less(planned: Callable[..., Plan]) -> None:
    for method in (NPO(rank=2), Spectral()):
        kept, less = (
            planned(dataclasses.replace(method, gradient_checkpointing=how), "bfloat16", batch_size=8)
            for how in (False, True)
        )
        assert part(less, ACTIVATIONS) < part(kept, ACTIVATIONS)
        assert part(less, CASTS) <= part(kept, CASTS)
    everything = planned(NPO(parameters="full"))
    assert part(everything, OPTIMIZER) > part(planned(NPO(rank=2)), OPTIMIZER)


@pytest.mark.parametrize("length", [3, 64])
@pytest.mark.parametrize("method", [Spectral, LIBU, AdaptiveRMU])
def test_random_rows_longer_and_shorter_than_all_others_are_planned(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, method: Any, length: int
) -> None:
    monkeypatch.setattr(random_text, "LENGTH", length)
    found, without = (planned(method(random_rows=count)) for count in (9, 0))
    assert part(found, ACTIVATIONS) > part(without, ACTIVATIONS) > 0
    assert part(found, REFERENCE) == part(without, REFERENCE)  # no log-odds of them are kept


def test_a_basis_of_ekfac_is_counted(planned: Callable[..., Plan]) -> None:
    diagonal, ekfac = (
        part(planned(LIBU(preconditioner=kind)), GRADIENTS, "start") for kind in ("diagonal", "ekfac")
    )
    assert ekfac > diagonal


def test_what_reads_the_target_beside_the_model_counts_its_weights_and_logits(
    planned: Callable[..., Plan],
) -> None:
    plain, held = (planned(method(parameters="full")) for method in (GradientDifference, KLMinimization))
    assert part(held, TRAINED) == 2 * part(plain, TRAINED)
    assert part(held, LOGITS) > part(plain, LOGITS)


def test_what_asks_the_target_about_forget_rows_counts_its_logits(
    planned: Callable[..., Plan],
) -> None:
    plain, held = (planned(m(parameters="full", retain_weight=0.0)) for m in (NPO, UNDIAL))
    assert part(held, TRAINED) == 2 * part(plain, TRAINED)
    assert part(held, LOGITS) > part(plain, LOGITS)


def test_a_preferred_output_runs_beside_the_rejected_one(planned: Callable[..., Plan]) -> None:
    plain, both = planned(NPO()), planned(IDKDPO())
    for kind in (ACTIVATIONS, LOGITS):
        assert part(plain, kind) < part(both, kind) <= 2 * part(plain, kind)


def test_an_answer_given_instead_runs_beside_the_question(planned: Callable[..., Plan]) -> None:
    plain, both = (planned(Spectral(answer_instead=answer)) for answer in (None, "No."))
    for kind in (ACTIVATIONS, LOGITS):
        assert part(plain, kind) < part(both, kind) <= 2 * part(plain, kind)


def test_a_step_that_may_not_be_cut_is_not_proposed_to_be(checked: Callable[..., Any]) -> None:
    for method, proposed in ((NPO(), True), (SamNPO(), False)):
        model, prepared = checked(method)
        options = [option for option, _ in alternatives(model, prepared, "float32", CPU)]
        assert any("--micro-batch-size" in option for option in options) is proposed
        assert any("--batch-size" in option for option in options)


def test_candidates_take_the_layers_above_and_the_head(planned: Callable[..., Plan]) -> None:
    best, last = (planned(AdaptiveRMU(layer=2), select=choice) for choice in ("best", "last"))
    assert part(best, WEIGHTS) > part(last, WEIGHTS)
    assert part(best, LOGITS, "measure") > 0 == part(last, LOGITS)
    assert best.measured_rows > 0 == last.measured_rows
    higher = planned(AdaptiveRMU(layer=3), select="best")
    assert part(higher, WEIGHTS) < part(best, WEIGHTS)


def test_a_cache_that_may_take_nothing_takes_nothing(planned: Callable[..., Plan]) -> None:
    cached, without = planned(AdaptiveRMU(layer=3)), planned(AdaptiveRMU(layer=3), cache_limit="0")
    assert cached.cache_rows > 0 == without.cache_rows == without.cache_bytes
    assert without.rows_recomputed == cached.cache_rows
    assert part(cached, PAGES) > part(without, PAGES)
    assert part(without, WEIGHTS) > part(cached, WEIGHTS)  # the layers below run in every step


def test_an_open_layer_is_planned_for_at_its_dearest(planned: Callable[..., Plan]) -> None:
    found = planned(AdaptiveRMU())
    assert "planned for layer" in found.warnings[-1]
    ends = [planned(AdaptiveRMU(layer=layer)) for layer in (2, 3)]
    assert found.peak.bytes == pytest.approx(max(end.peak.bytes for end in ends), rel=0.05)


def test_a_gpu_holds_no_process_and_the_processor_no_activations(
    planned: Callable[..., Plan],
) -> None:
    found = planned(LIBU(), "bfloat16", GPU)
    train = next(phase for phase in found.phases if phase.name == "train")
    assert train.parts[CONTEXT] > 0
    assert PROCESS not in train.parts
    assert PRODUCTS not in train.parts
    assert train.cpu_parts[PROCESS] > 0
    assert ACTIVATIONS not in train.cpu_parts
    assert next(p for p in found.phases if p.name == "load").cpu_bytes > train.cpu_parts[PROCESS]


def test_narrow_layers_keep_no_products_in_float32(planned: Callable[..., Plan]) -> None:
    """Of the maps 16x16, 32x16, 16x32 and the LM head the last alone is oneDNN's."""
    method = GradientDifference(parameters="full")
    narrow = part(planned(method, select="last"), PRODUCTS)
    assert part(planned(method, "bfloat16", select="last"), PRODUCTS) == 4 * narrow > 0


def test_a_tied_embedding_is_counted_once(
    planned: Callable[..., Plan], model_dir: Callable[[str], Path]
) -> None:
    directory = model_dir("qwen2")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert part(planned(LIBU(), model=directory), WEIGHTS, "load") == size


def test_what_would_fit_is_found_by_planning_it(checked: Callable[..., Any]) -> None:
    model, prepared = checked(Spectral(), batch_size=4)
    found = plan(model, prepared, "float32", GPU)
    others = dict(alternatives(model, prepared, "float32", GPU))
    single = {
        "--dtype bfloat16",
        "--select last",
        "--micro-batch-size 1",
        "--method.gradient-checkpointing",
        "--batch-size 2",
    }
    assert set(others) == {
        *single,
        " ".join(list(others)[:5]),
        "--method libu",
        "--method adaptive-rmu",
    }
    assert set(list(others)[:5]) == single
    together = others[list(others)[5]]
    assert together.peak.bytes < found.peak.bytes
    assert prepared.options.select == "best"  # what was planned first is as it was


def test_a_plan_takes_no_time(checked: Callable[..., Any]) -> None:
    given = checked(Spectral(), max_steps=10_000)
    started = time.process_time()
    plan(given[0], given[1], "float32", CPU)
    assert time.process_time() - started < 2


def test_budgets_are_gpus_sizes_or_this_machine() -> None:
    assert budget_of("h100-80", "auto", "cpu").device_type == "cuda"
    assert budget_of("24GB", "auto", "cpu") == Budget("24GB", 24 * GIB, "cuda")
    assert budget_of("24GB", "cpu", "cpu").device_type == "cpu"
    assert budget_of(None, "auto", "cpu").bytes > 2**28
    assert "rtx4090-24" in refusal(lambda: budget_of("a big one", "auto", "cpu"))
    assert "--device is cpu" in refusal(lambda: budget_of("t4-16", "cpu", "cpu"))


@pytest.mark.parametrize(("layers", "scale"), [(4, 1.0), (8, 1.0), (32, 0.25)])
def test_the_default_rate_of_full_weights_falls_with_width_and_depth(layers: int, scale: float) -> None:
    defaults = Spectral.defaults
    assert defaults.learning_rate_at(1024, layers, 96) == defaults.learning_rate / 4 * scale
    assert LIBU.defaults.learning_rate_at(1024, layers, 1) == LIBU.defaults.learning_rate / 4


@pytest.mark.parametrize(
    ("per_epoch", "epochs", "share"), [(1, 24, 0.5), (3, 24, 0.75**0.5), (6, 16, 1), (40, 8, 1)]
)
def test_a_small_request_takes_fewer_and_smaller_steps(
    per_epoch: int, epochs: int, share: float
) -> None:
    defaults = Spectral.defaults
    assert defaults.epochs_of(per_epoch) == epochs
    of_many = defaults.learning_rate_at(256, 4, 96)
    assert defaults.learning_rate_at(256, 4, per_epoch) == pytest.approx(share * of_many)
    assert LIBU.defaults.epochs_of(per_epoch) * per_epoch >= LIBU.defaults.least_steps
