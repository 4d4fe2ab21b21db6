"""The decoder's layers in every family, and hidden states that stop at their layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from conftest import FAMILIES, random_examples, refusal, shaken, tiny_model
from expunge.data.batches import Batch, collate
from expunge.models.decoder import (
    DecoderLayout,
    find_layout,
    forward_hook,
    hidden_states,
    skeleton_of,
)

LLAMA_LIKE = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def layout_of(
    layers: str, mlp_output: str, attention: tuple[str, ...], mlp: tuple[str, ...]
) -> DecoderLayout:
    """Four layers of width 16 with the same maps in each."""
    places = [f"{layers}.{index}." for index in range(4)]
    sides = (tuple(place + name for place in places for name in names) for names in (attention, mlp))
    return DecoderLayout(layers, 4, 16, mlp_output, *sides)


LAYOUTS = {
    **{
        family: layout_of("model.layers", "mlp.down_proj", *LLAMA_LIKE)
        for family in ("olmo", "olmo2", "llama", "qwen2")
    },
    "gpt_neox": layout_of(
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
        ("attention.query_key_value", "attention.dense"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "gpt2": layout_of(
        "transformer.h",
        "mlp.c_proj",
        ("attn.c_attn", "attn.c_proj"),
        ("mlp.c_fc", "mlp.c_proj"),
    ),
    "phi": layout_of(
        "model.layers",
        "mlp.fc2",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
        ("mlp.fc1", "mlp.fc2"),
    ),
    # Its linear maps are of a class of its own.
    "falcon": layout_of(
        "transformer.h",
        "mlp.dense_4h_to_h",
        ("self_attention.query_key_value", "self_attention.dense"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "opt": layout_of(
        "model.decoder.layers",
        "fc2",
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
        ("fc1", "fc2"),
    ),
}
FINAL_NORMS = {
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gpt2": "transformer.ln_f",
    "phi": "model.final_layernorm",
    "falcon": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_layers_and_projections_of_a_family_are_found(family: str) -> None:
    model = tiny_model(family, 300)
    layout = find_layout(model)
    for part in ("layers", "count", "width", "mlp_output"):
        assert getattr(layout, part) == getattr(LAYOUTS[family], part)
    assert set(layout.attention_linears) == set(LAYOUTS[family].attention_linears)
    assert set(layout.mlp_linears) == set(LAYOUTS[family].mlp_linears)
    assert layout.layer(model, 3) is model.get_submodule(f"{layout.layers}.3")
    assert model.get_parameter(layout.mlp_output_weight(1)).ndim == 2
    assert find_layout(skeleton_of(model.config)) == layout


def test_every_fixture_family_is_covered() -> None:
    assert set(FAMILIES) < set(LAYOUTS)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"d_model": 16, "num_layers": 2}, "is an encoder-decoder"),
    "bart": ({"d_model": 16, "encoder_layers": 2, "decoder_layers": 2}, "is an encoder-decoder"),
    "bert": (SIZES, "is an encoder"),
    "mixtral": (SIZES | {"num_local_experts": 2}, "mixture of experts"),
    "xlm": ({"emb_dim": 16, "n_layers": 2, "n_heads": 2}, "2 lists of 2 decoder layers"),
    "vit": ({"hidden_size": 16, "num_attention_heads": 2}, "no causal language model"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_architectures_are_refused_by_name(family: str) -> None:
    sizes, reason = REFUSED[family]
    message = refusal(lambda: find_layout(skeleton_of(AutoConfig.for_model(family, **sizes))))
    assert message.startswith(f"{family}: ")
    assert reason in message
    assert message.endswith("docs/models.md")


def test_layers_that_differ_are_each_known_by_their_own_maps() -> None:
    """Attention in some layers and a convolution in others; an MLP in all but one."""
    from transformers import AutoModelForCausalLM

    kinds = {"layer_types": ["conv", "full_attention"]}
    config = AutoConfig.for_model("lfm2", **SIZES, **kinds)
    model = AutoModelForCausalLM.from_config(config)
    layout = find_layout(model)
    assert layout.linears("attention", [0]) == [
        "model.layers.0.conv.in_proj",
        "model.layers.0.conv.out_proj",
    ]
    assert len(layout.linears("attention", [1])) == 4
    assert layout.linears("all", [1]) == layout.linears("attention", [1]) + layout.linears("mlp", [1])
    assert layout.mlp_output == "feed_forward.w2"  # w3 comes last and leads inward
    model.model.layers[1].feed_forward = torch.nn.Identity()
    layout = find_layout(model)
    assert not layout.mlp_output
    assert "unlearn it with --method spectral" in refusal(
        lambda: layout.check_mlp_output("--method rmu")
    )


def test_a_layer_out_of_range_names_the_option_and_the_range() -> None:
    layout = LAYOUTS["llama"]
    for inside in (2, 3):
        layout.check_layer(inside, 2, "--method.layer")
    for outside in (-1, 1, 4):
        message = refusal(lambda layer=outside: layout.check_layer(layer, 2, "--method.layer"))  # type: ignore[misc]
        assert message == (f"--method.layer {outside}: the model has the layers 0 to 3; choose 2 to 3")


@pytest.fixture
def batch() -> Batch:
    return collate(random_examples([9, 4, 7], 300), [0, 1, 2], pad_id=1)


@pytest.mark.parametrize("family", LAYOUTS)
def test_hidden_states_are_those_of_the_full_model(family: str, batch: Batch) -> None:
    model = shaken(tiny_model(family, 300))
    layout = find_layout(model)
    with torch.no_grad():
        full = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
        ).hidden_states
        real = batch.attention_mask.bool()
        for layer in range(layout.count):
            states = hidden_states(model, layout, layer, batch)
            if layer == layout.count - 1:  # transformers gives the last one after the final norm
                states = model.get_submodule(FINAL_NORMS.get(family, "model.norm"))(states)
            # The same operations on the same shapes, so nothing may differ.
            assert torch.equal(states[real], full[layer + 1][real])


@pytest.mark.parametrize("family", LAYOUTS)
def test_nothing_runs_above_the_layer(family: str, batch: Batch) -> None:
    model = tiny_model(family, 300)
    layout = find_layout(model)
    ran: list[int] = []
    hooks = [
        layout.layer(model, index).register_forward_hook(lambda *_, index=index: ran.append(index))
        for index in range(layout.count)
    ]
    head = model.get_output_embeddings().register_forward_hook(lambda *_: ran.append(99))
    for layer in range(layout.count):
        ran.clear()
        hidden_states(model, layout, layer, batch)
        assert ran == list(range(layer + 1))
    for hook in [*hooks, head]:
        hook.remove()


def test_hidden_states_carry_gradients_and_leave_no_hook(batch: Batch) -> None:
    model = tiny_model("llama", 300)
    layout = find_layout(model)
    hidden_states(model, layout, 1, batch).square().sum().backward()
    assert model.get_parameter(layout.mlp_output_weight(1)).grad is not None
    assert model.get_parameter(layout.mlp_output_weight(2)).grad is None
    assert not layout.layer(model, 1)._forward_hooks


def test_a_tuple_from_a_layer_is_unpacked(batch: Batch) -> None:
    model = tiny_model("llama", 300)
    layout = find_layout(model)
    plain = hidden_states(model, layout, 2, batch)
    as_tuple: Any = lambda _module, _inputs, output: (output, None)  # noqa: E731
    with forward_hook(layout.layer(model, 2), as_tuple):
        assert torch.equal(hidden_states(model, layout, 2, batch), plain)


def test_a_hook_is_removed_after_an_error() -> None:
    module = torch.nn.Linear(2, 2)

    def fail(*_: object) -> None:
        raise ValueError

    with pytest.raises(ValueError), forward_hook(module, fail):  # noqa: PT011
        module(torch.zeros(1, 2))
    assert not module._forward_hooks


@pytest.mark.parametrize("stacks", ["list", "parameter"])
def test_a_mixture_of_experts_is_known_by_its_router_not_by_names(stacks: str) -> None:
    model = tiny_model("llama", 50)
    for layer in model.model.layers:
        block = layer.mlp
        if stacks == "list":
            block.paths = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(3))
        else:
            block.paths = nn.Parameter(torch.zeros(3, 16, 32))
        # As RecurrentGemma's gates, one for each head, or a kernel: nothing chooses among them.
        block.conv = nn.Conv1d(5, 5, 3)
        block.gates = nn.Linear(16, 5)
    assert find_layout(model).count == 4
    model.model.layers[2].mlp.choose = nn.Linear(16, 3)
    assert "is a mixture of experts" in refusal(lambda: find_layout(model))
