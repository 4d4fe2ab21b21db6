"""An adapter alone as a model: what PEFT merges, on every path, in the result and in its record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import refusal
from expunge.models.files import ADAPTER, ADAPTER_CONFIG, SINGLE
from expunge.models.loading import check_model, load_model
from expunge.models.parts import StreamedModel

Make = Callable[..., Path]


@pytest.fixture
def adapter_of(tmp_path: Path) -> Make:
    """Saves an adapter of random factors for the model in a directory."""

    def make(base: Path, **settings: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        asked = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asked))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: value.clone() for name, value in merged.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}},
    ],
)
def test_an_adapter_is_merged_as_peft_merges_it_on_both_paths(
    settings: dict[str, Any], model_dir: Callable[[str], Path], adapter_of: Make
) -> None:
    base = model_dir("llama")
    adapter = adapter_of(base, **settings)
    checked = check_model(str(adapter))
    parts = StreamedModel(checked, torch.float32, "cpu")
    parts.load("")
    whole = dict(load_model(checked, "float32", "cpu").named_parameters())
    original = load_file(base / SINGLE)
    changed = 0
    for name, expected in merged_by_peft(base, adapter).items():
        torch.testing.assert_close(whole[name].data, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(parts.model.get_parameter(name), whole[name])
        changed += not torch.equal(expected, original[name])
    assert changed == 8
    assert {ADAPTER, ADAPTER_CONFIG, SINGLE} <= set(checked.files.sha256())


def test_a_run_on_an_adapter_writes_and_records_the_merged_model(
    memorised_dir: Path, row_files: dict[str, Path], adapter_of: Make, tmp_path: Path, run_cli: Any
) -> None:
    adapter = adapter_of(memorised_dir, init_lora_weights="gaussian")
    path = adapter / ADAPTER
    save_file({k: 1e-3 * v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"], "--quiet")
    out = tmp_path / "out"
    method = (
        *("--method", "adaptive-rmu", "--method.layer", 2),
        *("--max-steps", 1, "--learning-rate", "1e-6"),
    )
    code, _, said = run_cli("run", adapter, "--output", out, *method, *rows)
    assert code == 0, said
    manifest = json.loads((out / "expunge.json").read_text())
    assert {ADAPTER, ADAPTER_CONFIG, SINGLE} <= set(manifest["model_sha256"])
    assert manifest["merged_adapter"] == {"base": memorised_dir.name}
    assert not (out / ADAPTER_CONFIG).exists()
    after = dict(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).named_parameters())
    trained = {change["name"] for change in manifest["changed_tensors"]}
    for name, expected in merged_by_peft(memorised_dir, adapter).items():
        if name not in trained:
            torch.testing.assert_close(after[name].data, expected, rtol=1e-6, atol=1e-6)
    kept = ("--method", "libu", "--keep-adapter", "--output", tmp_path / "kept")
    code, _, said = run_cli("run", adapter, *kept, *rows)
    assert code == 2
    assert "--keep-adapter" in said


def test_an_adapter_beside_a_whole_model_is_refused(
    model_dir: Callable[[str], Path], adapter_of: Make
) -> None:
    base = model_dir("llama")
    adapter = adapter_of(base)
    for path in base.iterdir():
        shutil.copy(path, adapter)
    message = refusal(lambda: check_model(str(adapter)))
    assert message.startswith(f"{adapter}: holds a whole model and {ADAPTER_CONFIG}")
    assert "move the adapter's files to a directory of its own" in message


def test_a_base_beside_the_adapter_and_an_own_tokenizer_are_found(
    model_dir: Callable[[str], Path], adapter_of: Make
) -> None:
    base = model_dir("llama")
    adapter = adapter_of(base)
    shutil.copytree(base, adapter / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    edit(adapter, base_model_name_or_path="base")
    files = check_model(str(adapter)).files
    assert (files.directory, files.tokenizer) == (adapter / "base", adapter)


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no base": (lambda d: edit(d, base_model_name_or_path=None), "names no base model"),
    "a base that is gone": (
        lambda d: edit(d, base_model_name_or_path="/no/such"),
        "base_model_name_or_path: /no/such: no such model directory",
    ),
    "another kind": (lambda d: edit(d, peft_type="LOHA"), "peft_type makes it another thing"),
    "DoRA": (lambda d: edit(d, use_dora=True), "use_dora makes it another thing"),
    "aLoRA": (lambda d: edit(d, alora_invocation_tokens=[3]), "alora_invocation_tokens makes it"),
    "a newer field": (lambda d: edit(d, use_xora=True), "use_xora makes it another thing"),
    "PiSSA": (lambda d: edit(d, init_lora_weights="pissa"), "changes the base's weights"),
    "no kind": (lambda d: edit(d, peft_type="?"), "PEFT does not read it"),
    "broken": (lambda d: (d / ADAPTER_CONFIG).write_text("{"), "is not a valid JSON file"),
    "no weights": (lambda d: (d / ADAPTER).unlink(), f"has no {ADAPTER}"),
    "a whole head": (
        lambda d: add(d, "base_model.model.lm_head.weight", torch.zeros(4, 16)),
        "lm_head.weight is no low-rank factor",
    ),
    "half a pair": (
        lambda d: add(d, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", None),
        "factors of model.layers.0.mlp.up_proj do not fit",
    ),
    "another width": (
        lambda d: add(d, "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", None),
        "do not fit the base's (16, 32)",
    ),
}  # fmt: skip


def add(adapter: Path, name: str, value: torch.Tensor | None) -> None:
    path = adapter / ADAPTER
    value = torch.zeros(4, 16) if value is None else value
    save_file(load_file(path) | {name: value}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_merged_is_refused_by_name(
    fault: str, model_dir: Callable[[str], Path], adapter_of: Make
) -> None:
    adapter = adapter_of(model_dir("llama"))
    mutate, told = FAULTS[fault]
    mutate(adapter)
    assert told in refusal(lambda: check_model(str(adapter)))


def test_transposed_weights_are_added_to_in_their_own_shape() -> None:
    from expunge.models.tensors import LowRank, StoredTensor

    a = StoredTensor(Path(), "a", torch.float32, (2, 3), 0, 24)
    b = StoredTensor(Path(), "b", torch.float32, (5, 2), 0, 40)
    assert LowRank(a, b, 1.0, transposed=False).shape == (5, 3)
    assert LowRank(a, b, 1.0, transposed=True).shape == (3, 5)
