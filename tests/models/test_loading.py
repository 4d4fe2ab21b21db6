"""Loading: the dtype that was asked for, nothing random, no foreign code, devices that exist."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from conftest import refusal
from expunge.models.devices import resolve_device
from expunge.models.loading import check_model, load_model
from expunge.models.parts import StreamedModel
from expunge.models.text_forms import context_of, text_policy
from expunge.models.writing import copy_target


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
    assert (checked.context, checked.layout.count) == (128, 4)
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
def test_a_configuration_that_makes_no_model_is_refused(change: dict[str, Any], copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))
    assert refusal(lambda: check_model(str(copied))).startswith(f"{copied / 'config.json'}: ")


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"load_in_8bit": True}, "(bitsandbytes, 8 bits)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "call model.dequantize()"),
        ({"quant_method": "gptq", "bits": 4}, "(gptq, 4 bits); give the one from before"),
        ({"quant_method": "awq", "bits": 4}, "(awq, 4 bits)"),
        ({"quant_method": "fp8"}, "FineGrainedFP8Config(dequantize=True)"),
        ({"quant_method": "mxfp4"}, "Mxfp4Config(dequantize=True)"),
        ({"quant_method": "compressed-tensors"}, "CompressedTensorsConfig(run_compressed=False)"),
        ({"quant_method": "of tomorrow"}, "(of tomorrow); give the one from before quantisation"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_quantised_checkpoint_is_refused_by_its_name(
    inside: bool, facts: dict[str, Any], told: str, copied: Path
) -> None:
    config = json.loads((copied / "config.json").read_text())
    quantised = {"quantization_config": facts}
    config |= {"text_config": quantised} if inside else quantised
    (copied / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: check_model(str(copied)))
    assert message.startswith(f"{copied / 'config.json'}: the checkpoint is quantised (")
    assert told in message


def test_codes_in_the_place_of_weights_are_refused_without_a_word_of_it(copied: Path) -> None:
    path = copied / "model.safetensors"
    name = "model.layers.2.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    message = refusal(lambda: check_model(str(copied)))
    assert f"tensor {name} has the dtype int8" in message


@pytest.mark.parametrize("value", ["</s>", ["</s>"], 10**30, 2.5, True])
def test_a_token_id_that_is_none_is_refused_before_anything_runs(value: Any, copied: Path) -> None:
    path = copied / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    message = refusal(lambda: check_model(str(copied)))
    assert message == f"{path}: eos_token_id {value!r} is no token id; write its number"


def test_what_a_library_says_on_several_lines_is_told_whole(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text()) | {"eos_token_id": "</s>"}
    (copied / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: check_model(str(copied)))
    assert "eos_token_id" in message
    assert "'</s>'" in message


def test_a_tokenizer_that_encodes_nothing_is_refused(copied: Path) -> None:
    path = copied / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "many"}))
    assert "its tokenizer does not load" in refusal(lambda: check_model(str(copied)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_found_as_they_are_read(value: float, copied: Path) -> None:
    path = copied / "model.safetensors"
    name = "model.layers.2.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 4] = value
    save_file(tensors, path, metadata={"format": "pt"})
    checked = check_model(str(copied))
    told = f"{path}: tensor {name} holds NaN or infinity in float32; give a checkpoint without"
    assert refusal(lambda: load_model(checked, "float32", "cpu")) == told
    parts = StreamedModel(checked, torch.float32, "cpu")
    assert refusal(lambda: parts.load("model.layers.2")) == told


def test_a_weight_that_float16_cannot_hold_is_named_with_the_dtype_that_can(copied: Path) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    message = refusal(lambda: load_model(check_model(str(copied)), "float16", "cpu"))
    assert "tensor model.norm.weight holds NaN or infinity in float16" in message
    assert "or --dtype float32" in message


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
    assert "give --trust-remote-code" in message
    assert not marker.exists()


def test_modules_that_configurations_name_go_with_the_model_and_no_others(
    copied: Path, tmp_path: Path
) -> None:
    """Whether or not they were run: the configuration that names them is copied as well."""
    (copied / "modeling.py").write_text("from .parts import X\n")
    for name in ("parts", "tok", "notes"):
        (copied / f"{name}.py").write_text("X = 1\n")
    for file, classes in (
        ("config.json", {"AutoModelForCausalLM": "modeling.M", "AutoConfig": "owner/repo--far.C"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "tok.T"]}),
    ):
        config = json.loads((copied / file).read_text()) | {"auto_map": classes}
        (copied / file).write_text(json.dumps(config))
    checked = check_model(str(copied))
    output = tmp_path / "output"
    output.mkdir()
    copy_target(checked, output)
    modules = {path.name for path in output.glob("*.py")}
    assert modules == {"modeling.py", "parts.py", "tok.py"}
    assert modules <= set(checked.files.sha256())


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


@pytest.mark.parametrize(
    ("family", "stated", "context"),
    [
        ("llama", {"max_position_embeddings": 77}, 77),
        ("gpt2", {"n_positions": 77}, 77),
        ("mpt", {"max_seq_len": 77}, 77),
        ("bloom", {"seq_length": 77}, 77),
        ("bloom", {}, sys.maxsize),
        ("mamba", {}, sys.maxsize),
    ],
)
def test_the_context_is_found_under_each_name(family: str, stated: dict[str, int], context: int) -> None:
    assert context_of(AutoConfig.for_model(family, **stated)) == context


def test_a_context_that_nothing_tells_is_asked_for() -> None:
    class OwnConfig(PretrainedConfig):
        model_type = "own"

    unstated = AutoConfig.for_model("llama", max_position_embeddings=0)
    for config in (OwnConfig(), unstated):
        message = refusal(lambda: context_of(config))  # noqa: B023
        assert message.startswith(f"{config.model_type}: its config.json states no context; write")
        assert "max_position_embeddings" in message
