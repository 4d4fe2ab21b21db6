"""Loading: the dtype that was asked for, nothing random, no foreign code, devices that exist."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import refusal
from expunge.models.loading import (
    check_model,
    context_of,
    load_model,
    pad_id_of,
    resolve_device,
    text_policy,
)


@pytest.fixture
def copied(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir("llama"), tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_in_the_dtype_asked_for(copied: Path, dtype: Any) -> None:
    model = load_model(check_model(str(copied)), dtype, "cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training


def test_what_a_checked_model_says_of_itself(copied: Path) -> None:
    checked = check_model(str(copied))
    assert (checked.context, checked.pad_id, checked.layout.count) == (128, 1, 4)
    policy = text_policy(checked, chat_template=False, long_rows="window")
    assert (policy.context, policy.chat_template, policy.long_rows) == (128, False, "window")


def test_a_tensor_that_is_missing_is_not_made_up(copied: Path) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    message = refusal(lambda: check_model(str(copied)))
    assert "1 tensors are not in its files, first model.layers.2.mlp.down_proj.weight" in message


def test_a_tensor_of_another_shape_is_refused(copied: Path) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    message = refusal(lambda: check_model(str(copied)))
    assert "wants model.layers.2.mlp.down_proj.weight of the shape" in message
    assert "the files hold (3, 3)" in message


def test_a_configuration_of_fewer_layers_is_refused(copied: Path) -> None:
    """transformers would load the first ones without a word."""
    config = json.loads((copied / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config.pop("layer_types", None)
    (copied / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: check_model(str(copied)))
    assert f"says {config['num_hidden_layers']} layers, but the files hold model.layers." in message


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "foo"},
        {"hidden_size": 0},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    change: dict[str, Any], copied: Path
) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))
    assert refusal(lambda: check_model(str(copied))).startswith(f"{copied / 'config.json'}: ")


def test_code_that_a_model_brings_along_does_not_run(copied: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copied / "code.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import LlamaConfig\nclass C(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}
    (copied / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: check_model(str(copied)))
    assert message.startswith(f"{copied / 'config.json'}: ")
    assert not marker.exists()


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line() -> None:
    message = refusal(lambda: check_model("no-such-owner/no-such-model"))
    assert message.startswith("no-such-owner/no-such-model: no such model directory, and not to be")


@pytest.mark.parametrize("name", ["./no/such", "no/such/model", "nowhere"])
def test_a_path_is_never_taken_for_a_hub_id(name: str) -> None:
    assert "no such model directory; give the folder" in refusal(lambda: check_model(name))


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    message = refusal(lambda: resolve_device("cuda:1"))
    assert message == "--device cuda:1: not available on this machine; use auto or cpu"
    assert "unknown; use auto, cpu, cuda or mps" in refusal(lambda: resolve_device("gpu"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"


def test_a_context_that_is_not_stated_is_refused() -> None:
    config: Any = SimpleNamespace(model_type="rwkv", max_position_embeddings=None)
    assert "rwkv: its configuration states no context" in refusal(lambda: context_of(config))


@pytest.mark.parametrize(("pad", "eos", "used"), [(3, 5, 3), (None, 5, 5), (None, None, 0)])
def test_padding_is_filled_with_what_there_is(pad: int | None, eos: int | None, used: int) -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert pad_id_of(tokenizer) == used
