"""Spread weights train, are saved and come back as whole ones do; in a group of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import exact_muon
from conftest import tiny_model
from expunge.models.decoder import find_layout
from expunge.models.sharding import is_sharded, part_like, shard, whole
from expunge.models.weights import restore, snapshot, train_only
from expunge.training.muon import Muon
from expunge.training.state import load_state, optimizer_tensors, restore_optimizer, save_state


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def trained(dtype: torch.dtype, *, sharded: bool) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The same model each time, and the linear maps of its layers."""
    model = tiny_model("olmo", 40).to(dtype)
    layout = find_layout(model)
    if sharded:
        shard(model, layout, [f"{name}.weight" for name in layout.linears()])
    return model, train_only(model, [f"{name}.weight" for name in layout.linears()])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Two passes a step, as a forget and a retain term make."""
    ids = torch.arange(24).view(2, 12)
    for _ in range(steps):
        logits = [model(input_ids=rows).logits for rows in ids.split(1)]
        (logits[0].square().mean() - 3 * logits[1].square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.usefixtures("group")
def test_sharded_weights_move_as_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_muon.PRODUCTS, torch.float64)
    model, plain = trained(torch.float32, sharded=False)
    before = snapshot(plain)
    train(model, Muon(plain.values(), 0.01))
    model, ours = trained(torch.float32, sharded=True)
    assert all(is_sharded(parameter) for parameter in model.parameters())
    train(model, Muon(ours.values(), 0.01))
    assert ours.keys() == plain.keys()
    for name, parameter in plain.items():
        moved = (parameter - before[name]).norm()
        assert moved > 0
        assert (whole(ours[name]) - parameter).norm() < 1e-4 * moved, name


@pytest.mark.usefixtures("group")
def test_masters_are_float32_beside_frozen_bfloat16() -> None:
    model, ours = trained(torch.bfloat16, sharded=True)
    train(model, Muon(ours.values(), 0.01), 1)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in ours else torch.bfloat16), name
        assert parameter.requires_grad == (name in ours), name


@pytest.mark.usefixtures("group")
def test_a_saved_state_is_whole_and_goes_on_sharded(tmp_path: Path) -> None:
    model, first = trained(torch.float32, sharded=True)
    optimizer = Muon(first.values(), 0.01)
    train(model, optimizer)
    best = snapshot(first)
    save_state(
        tmp_path, {}, {"parameters": first, "optimizer": optimizer_tensors(optimizer), "best": best}
    )
    train(model, optimizer)

    saved = load_state(tmp_path)
    assert saved is not None
    model, again = trained(torch.float32, sharded=True)
    optimizer = Muon(again.values(), 0.01)
    restore_optimizer(optimizer, saved.under("optimizer"))
    for group in ("parameters", "best"):
        read = saved.under(group)
        assert not any(map(is_sharded, read.values()))
        restore(again, {name: part_like(tensor, again[name]) for name, tensor in read.items()})
        for name, tensor in best.items():
            assert torch.equal(whole(again[name]), whole(tensor))
    train(model, optimizer)
    for name, parameter in first.items():
        assert torch.equal(whole(again[name]), whole(parameter))
