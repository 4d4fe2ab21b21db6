"""Any run of layers on its own, against the hidden states of the whole model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_packing import SLIDING, apart, model_of, rows_of
from torch import nn

from conftest import FAMILIES, shaken, tiny_model
from expunge.models.decoder import find_layout, forward_hook
from expunge.segments.packing import NotASegment
from expunge.segments.segment import Segment, relative_error

LAYERS = 4
ALL_LAYER_TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "gpt_neox without parallel residuals": ("gpt_neox", {"use_parallel_residual": False}),
    "olmo3 with windows in some layers": (
        "olmo3",
        SLIDING["olmo3"] | {"layer_types": ALL_LAYER_TYPES},
    ),
    "qwen2 with windows in the upper layers": ("qwen2", SLIDING["qwen2"]),
    "mistral with a window": ("mistral", SLIDING["mistral"]),
    "gemma3_text with rotations by the kind of layer": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ALL_LAYER_TYPES},
    ),
    "phi with parallel residuals and biases": ("phi", {}),
    "granite with multipliers": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
}
LENGTHS = [9, 1, 4, 13]


def model_of_kind(kind: str) -> Any:
    family, extra = KINDS[kind]
    model = model_of(family, num_hidden_layers=LAYERS, **extra) if extra else None
    return model or shaken(tiny_model(family, 64, layers=LAYERS))


def states_of(model: Any) -> list[torch.Tensor]:
    """Embeddings and the output of every layer, of each row in a pass of its own: (tokens, width)."""
    layout = find_layout(model)
    modules = [
        model.get_input_embeddings(),
        *(layout.layer(model, index) for index in range(layout.count)),
    ]
    caught: list[list[torch.Tensor]] = [[] for _ in modules]

    def keep(place: int) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            caught[place].append((output[0] if isinstance(output, tuple) else output)[0])

        return hook

    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    with torch.no_grad():
        apart(model, rows_of(LENGTHS))
    for handle in handles:
        handle.remove()
    return [torch.cat(rows) for rows in caught]


def segment_of(model: Any, first: int, last: int) -> Segment:
    return Segment(model, find_layout(model), first, last)


@pytest.mark.parametrize("kind", KINDS)
def test_every_segment_gives_the_whole_models_states(kind: str) -> None:
    model = model_of_kind(kind)
    states = states_of(model)
    ids = torch.cat(rows_of(LENGTHS))
    with torch.no_grad():
        for last in range(LAYERS):
            found = segment_of(model, 0, last).from_ids(ids, LENGTHS)
            assert relative_error(found, states[last + 1]) < 1e-5, last
            for first in range(last + 1):
                found = segment_of(model, first, last)(states[first], LENGTHS)
                assert found.shape == states[first].shape
                assert relative_error(found, states[last + 1]) < 1e-5, (first, last)
        empty = segment_of(model, 0, -1).from_ids(ids, LENGTHS)
        assert torch.equal(empty, states[0])
    # Else a segment that leaves a layer out would pass.
    for below, above in itertools.pairwise(states):
        assert relative_error(below, above) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_uppermost_segments_give_the_models_logits(kind: str) -> None:
    model = model_of_kind(kind)
    states = states_of(model)
    with torch.no_grad():
        expected = apart(model, rows_of(LENGTHS))
        for first in range(LAYERS):
            found = segment_of(model, first, LAYERS - 1).logits(states[first], LENGTHS)
            assert relative_error(found, expected) < 1e-5, first


def test_the_rows_may_come_in_any_order_and_company() -> None:
    model = model_of_kind("llama")
    states = states_of(model)[1]
    segment = segment_of(model, 1, 3)
    with torch.no_grad():
        together = segment(states, LENGTHS).split(LENGTHS)
        for row, alone in enumerate(states.split(LENGTHS)):
            torch.testing.assert_close(segment(alone, [len(alone)]), together[row])
        turned = torch.cat(states.split(LENGTHS)[::-1])
        back = segment(turned, LENGTHS[::-1]).split(LENGTHS[::-1])[::-1]
    for one, other in zip(back, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_segments_weights_and_no_others() -> None:
    model = model_of_kind("olmo")
    layout = find_layout(model)
    states = states_of(model)
    weight = model.get_parameter(layout.mlp_output_weight(1))
    segment_of(model, 1, 2)(states[1], LENGTHS).square().sum().backward()
    found = weight.grad.clone()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("model.layers.1.", "model.layers.2."))
    }
    # Reference: the whole model, row by row.
    model.zero_grad()
    caught: list[torch.Tensor] = []
    with forward_hook(layout.layer(model, 2), lambda _m, _i, output: caught.append(output)):
        apart(model, rows_of(LENGTHS))
    sum(output.square().sum() for output in caught).backward()  # type: ignore[union-attr]
    assert relative_error(found, weight.grad) < 1e-5


def test_the_models_parameters_are_shared_and_the_model_is_left_as_it_was() -> None:
    model = model_of_kind("olmo3 with windows in some layers")
    config = model.config.to_dict()
    rows = rows_of(LENGTHS)
    with torch.no_grad():
        before = apart(model, rows)
        segment = segment_of(model, 1, 2)
        states = states_of(model)[1]
        old = segment(states, LENGTHS)
        assert model.config.to_dict() == config
        assert len(model.model.layers) == model.config.num_hidden_layers == LAYERS
        assert torch.equal(apart(model, rows), before)
        assert not any(m._forward_hooks for m in model.modules())
        original = model.model.layers[2].mlp.down_proj.weight.clone()
        model.model.layers[2].mlp.down_proj.weight[0] += 1
        assert relative_error(segment(states, LENGTHS), old) > 1e-2
        # A parameter that is exchanged, as a streamed model does, is seen too.
        model.model.layers[2].mlp.down_proj.weight = nn.Parameter(original)
        assert relative_error(segment(states, LENGTHS), old) < 1e-6


def test_layers_that_return_tuples_are_understood() -> None:
    model = model_of_kind("llama")
    states = states_of(model)
    as_tuple: Any = lambda _module, _inputs, output: (output, None)  # noqa: E731
    with torch.no_grad(), forward_hook(model.model.layers[1], as_tuple):
        found = segment_of(model, 1, 1)(states[1], LENGTHS)
    assert relative_error(found, states[2]) < 1e-5


def test_nothing_above_the_last_layer_runs() -> None:
    model = model_of_kind("llama")
    states = states_of(model)

    def fail(*_: object) -> None:
        raise AssertionError

    handles = [
        module.register_forward_pre_hook(fail)
        for module in (
            model.model.layers[0],
            model.model.layers[3],
            model.model.norm,
            model.lm_head,
        )
    ]
    segment_of(model, 1, 2)(states[1], LENGTHS)
    for handle in handles:
        handle.remove()


def test_layers_deeper_inside_the_model_are_refused_by_place() -> None:
    model = tiny_model("opt", 64)
    layout = find_layout(model)
    with pytest.raises(NotASegment, match=r"its layers are at model\.decoder\.layers"):
        Segment(model, layout, 0, 1)


def test_positions_that_are_added_to_the_embeddings_are_added_again_to_states() -> None:
    """Why a segment is measured before it is used: GPT-2's upper layers are none."""
    model = shaken(tiny_model("gpt2", 64, layers=LAYERS))
    states = states_of(model)
    with torch.no_grad():
        assert relative_error(segment_of(model, 0, 2)(states[0], LENGTHS), states[3]) < 1e-5
        assert relative_error(segment_of(model, 1, 2)(states[1], LENGTHS), states[3]) > 1e-2


def test_the_relative_error_is_in_units_of_what_was_expected() -> None:
    expected = torch.tensor([[3.0, 4.0]])
    assert relative_error(expected, expected) == 0
    assert relative_error(torch.tensor([[3.0, 4.5]]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([[0.0, 0.0]]), expected) == pytest.approx(1)
    low = expected.to(torch.bfloat16)
    assert relative_error(low, expected) == 0
    assert relative_error(torch.ones(1), torch.zeros(1)) > 1e20
    assert not relative_error(torch.tensor([float("nan")]), torch.ones(1)) <= 1
