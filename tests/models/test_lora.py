"""Adapters in place: off is the model of before, merging is W + alpha/rank * B A, then all is plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import FAMILIES, random_examples, shaken, tiny_model
from expunge.data.batches import collate
from expunge.models.decoder import Targets, find_layout
from expunge.models.lora import Adapter, LoraShape

ALL = (*FAMILIES, "gpt2")
# What PEFT warns of would stand on the command's standard error.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")
SHAPE = LoraShape(rank=3, alpha=6.0, dropout=0.0, targets="all")


def logits(model: Any) -> torch.Tensor:
    batch = collate(random_examples([8, 5], 300), [0, 1], pad_id=1)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def adapted(model: Any, shape: LoraShape = SHAPE, seed: int = 0) -> Adapter:
    return Adapter(model, find_layout(model), shape, seed)


def filled(adapter: Adapter) -> Adapter:
    """The adapter as training leaves it: B is no longer 0."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def plain_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ALL)
def test_off_is_the_model_of_before_and_a_fresh_adapter_too(family: str) -> None:
    model = shaken(tiny_model(family, 300))
    before = logits(model).detach()
    adapter = adapted(model)
    assert torch.equal(logits(model), before)
    filled(adapter)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with adapter.off():
        inside = logits(model)
    assert torch.equal(inside, before)
    assert not inside.requires_grad
    assert logits(model).requires_grad


@pytest.mark.parametrize("family", ALL)
def test_only_b_has_a_gradient_in_a_fresh_adapter(family: str) -> None:
    model = shaken(tiny_model(family, 300))
    adapter = adapted(model)
    logits(model).square().mean().backward()
    moves = set()
    for name, factor in adapter.parameters.items():
        assert factor.grad is not None
        moves |= {name} if factor.grad.any() else set()
    assert moves == set(adapter.moves_first) == {name for name in adapter.parameters if "lora_B" in name}


@pytest.mark.parametrize("family", ALL)
def test_merging_adds_the_scaled_product_and_leaves_a_plain_model(family: str) -> None:
    model = shaken(tiny_model(family, 300))
    before, modules = plain_state(model), [(n, type(m)) for n, m in model.named_modules()]
    attributes = set(vars(model))
    adapter = filled(adapted(model))
    factors = {name: parameter.detach().clone() for name, parameter in adapter.parameters.items()}
    with_adapter = logits(model).detach()
    merged = adapter.merge()

    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert set(vars(model)) == attributes
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = plain_state(model)
    assert after.keys() == before.keys()
    assert {f"{name}.weight" for name in adapter.layers} == set(merged)
    for name, weight in after.items():
        if name not in merged:
            assert torch.equal(weight, before[name])
            continue
        stem = name.removesuffix(".weight")
        a, b = factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"]
        delta = torch.stack([torch.outer(b[:, r], a[r]) for r in range(3)]).sum(0) * (6.0 / 3)
        expected = before[name] + (delta.T if family == "gpt2" else delta)
        # float32, sums of three products in another order
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(merged[name], weight)
    # The same sums, split and joined differently, through four layers of large weights.
    torch.testing.assert_close(logits(model), with_adapter, rtol=1e-3, atol=1e-3)


def test_a_second_adapter_finds_nothing_of_the_first() -> None:
    model = shaken(tiny_model("llama", 300))
    filled(adapted(model)).merge()
    before = logits(model).detach()
    second = filled(adapted(model, LoraShape(2, 2.0, 0.0, "mlp")))
    assert {p.shape[0] for n, p in second.parameters.items() if "lora_A" in n} == {2}
    with second.off():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_targets_are_those_of_every_layer_and_nothing_else(targets: Targets) -> None:
    model = tiny_model("llama", 300)
    adapter = adapted(model, LoraShape(2, 2.0, 0.0, targets))
    wanted = {"attention": ("self_attn",), "mlp": ("mlp",), "all": ("self_attn", "mlp")}[targets]
    assert {name.split(".")[3] for name in adapter.layers} == set(wanted)
    assert {name.split(".")[2] for name in adapter.layers} == {"0", "1", "2", "3"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter.parameters) == 2 * len(adapter.layers)
    assert all("lora_" in name for name in trained)
    assert dict(adapter.factors()).keys() == adapter.parameters.keys()
    for name, factor in adapter.factors():
        assert factor.weight is adapter.parameters[name]


def test_layer_1_is_not_taken_for_layer_11() -> None:
    adapter = adapted(tiny_model("llama", 300, layers=12), LoraShape(2, 2.0, 0.0, "mlp"))
    assert len(adapter.layers) == 12 * 3


def test_the_draw_depends_on_the_seed_alone() -> None:
    drawn = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        expected_next = torch.rand(1, generator=torch.Generator().manual_seed(disturbance))
        adapter = adapted(tiny_model("llama", 300), seed=seed)
        assert torch.equal(torch.rand(1), expected_next)  # the global generator is untouched
        drawn.append(torch.cat([p.detach().flatten() for p in adapter.parameters.values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dropout_acts_in_training_steps_only() -> None:
    model = shaken(tiny_model("llama", 300))
    adapter = filled(adapted(model, LoraShape(3, 6.0, 0.5, "all")))
    assert torch.equal(logits(model), logits(model))
    adapter.set_dropout(True)
    assert not torch.equal(logits(model), logits(model))
    adapter.set_dropout(False)
    assert torch.equal(logits(model), logits(model))


def test_off_ends_after_an_exception() -> None:
    model = shaken(tiny_model("llama", 300))
    adapter = filled(adapted(model))
    before = logits(model).detach()
    with pytest.raises(ZeroDivisionError), adapter.off():
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    logits(model).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters.values())


def test_bfloat16_weights_are_merged_in_float32_and_cast_once() -> None:
    model = shaken(tiny_model("llama", 300)).to(torch.bfloat16)
    before = plain_state(model)
    adapter = filled(adapted(model))
    assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}
    factors = {name: parameter.detach().clone() for name, parameter in adapter.parameters.items()}
    for name, total in adapter.merge().items():
        stem = name.removesuffix(".weight")
        a, b = factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"]
        torch.testing.assert_close(total, before[name].float() + 2 * b @ a, rtol=1e-6, atol=1e-6)
        assert torch.equal(model.get_parameter(name), total.to(torch.bfloat16))


def test_a_sum_that_is_not_finite_is_never_merged() -> None:
    model = tiny_model("llama", 300)
    adapter = filled(adapted(model))
    next(iter(adapter.parameters.values())).data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.\w+: the merged weight is not"):
        adapter.merge()


def test_the_saved_adapter_is_one_that_peft_reads(tmp_path: Path) -> None:
    from peft import PeftModel

    model = shaken(tiny_model("llama", 300))
    adapter = filled(adapted(model))
    save_file(adapter.state(), tmp_path / "adapter_model.safetensors")
    adapter.config.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(shaken(tiny_model("llama", 300)), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
