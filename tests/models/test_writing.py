"""The written checkpoint: the target's files, with the changed tensors and nothing else replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import refusal, shaken, tiny_model
from expunge.errors import RunError
from expunge.models.files import INDEX, SINGLE, check_model_files
from expunge.models.loading import CheckedModel, check_model
from expunge.models.tensors import stored_tensors
from expunge.models.writing import (
    TensorChange,
    check_disk_space,
    copy_target,
    rounding_warnings,
    verify_checkpoint,
    write_checkpoint,
)

NAMES = ["model.layers.1.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"]
Save = Callable[..., CheckedModel]
BOTH_WAYS = pytest.mark.parametrize("streamed", [False, True])


@pytest.fixture
def save(tokenizer: Any, tmp_path: Path) -> Save:
    def call(model: Any = None, **options: Any) -> CheckedModel:
        directory = tmp_path / "model"
        (model or tiny_model("olmo", len(tokenizer))).save_pretrained(directory, **options)
        tokenizer.save_pretrained(directory)
        return check_model(str(directory))

    return call


@pytest.fixture
def output(tmp_path: Path) -> Path:
    directory = tmp_path / "output"
    directory.mkdir()
    return directory


def changed(checked: CheckedModel, names: list[str] = NAMES) -> dict[str, torch.Tensor]:
    """New float32 values, by the model's names."""
    stored = {name: checked.stored_names[name][0] for name in names}
    tensors = tensors_of(checked.files.directory)
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensors[key].float() + 0.01 * torch.randn(tensors[key].shape, generator=generator)
        for name, key in stored.items()
    }


def write(
    checked: CheckedModel, weights: Mapping[str, torch.Tensor], output: Path
) -> list[TensorChange]:
    copy_target(checked, output)
    return write_checkpoint(checked, weights, output)


def verify(checked: CheckedModel, weights: Mapping[str, torch.Tensor], output: Path) -> None:
    """In both ways."""
    for streamed in (False, True):
        verify_checkpoint(checked, weights, output, streamed=streamed)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in check_model_files(directory).shards:
        tensors |= load_file(shard)
    return tensors


def assert_only_changed(checked: CheckedModel, output: Path, names: list[str]) -> None:
    before, after = tensors_of(checked.files.directory), tensors_of(output)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
        assert same == (name not in names)
        assert after[name].dtype == tensor.dtype


def test_only_the_named_tensors_change(save: Save, output: Path) -> None:
    checked = save()
    weights = changed(checked)
    changes = write(checked, weights, output)
    assert_only_changed(checked, output, NAMES)
    after = tensors_of(output)
    assert all(torch.equal(after[name], weights[name]) for name in NAMES)
    assert [change.name for change in changes] == NAMES
    verify(checked, weights, output)
    for opened in (checked.files.directory, output):
        with safe_open(opened / SINGLE, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_what_changed_is_measured_against_the_file(save: Save, output: Path) -> None:
    checked = save(tiny_model("olmo", 400).to(torch.bfloat16))
    weights = changed(checked, NAMES[:1])
    (change,) = map(asdict, write(checked, weights, output))
    old = tensors_of(checked.files.directory)[NAMES[0]]
    new = tensors_of(output)[NAMES[0]]
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, weights[NAMES[0]].to(torch.bfloat16))  # cast once
    expected = {
        "norm": old.float().norm(),
        "change_norm": (new.float() - old.float()).norm(),
        "rounding_norm": (weights[NAMES[0]] - new.float()).norm(),
        "changed_share": (new != old).float().mean(),
    }
    assert change == {"name": NAMES[0], "dtype": "bfloat16"} | {
        name: pytest.approx(float(value)) for name, value in expected.items()
    }
    assert 0 < change["rounding_norm"] < change["change_norm"]
    verify(checked, weights, output)


def test_shards_stay_as_they_are_and_untouched_ones_are_copies(save: Save, output: Path) -> None:
    checked = save(max_shard_size="20KB")
    weights = changed(checked)
    assert len(checked.files.shards) > 3
    write(checked, weights, output)
    assert_only_changed(checked, output, NAMES)
    touched = {checked.files.tensors[name].path.name for name in NAMES}
    for shard in checked.files.shards:
        identical = shard.read_bytes() == (output / shard.name).read_bytes()
        assert identical == (shard.name not in touched)
    assert (output / INDEX).read_text() == (checked.files.directory / INDEX).read_text()
    verify(checked, weights, output)


def test_rows_that_lie_beside_the_model_are_not_copied(save: Save, output: Path) -> None:
    checked = save()
    beside = ("forget.jsonl", "retain.jsonl", "forget.json", "optimizer.bin", "README.md")
    for name in beside:
        (checked.files.directory / name).write_text("secret")
    (checked.files.directory / "LICENSE").write_text("free")
    write(checked, changed(checked), output)
    written = {path.name for path in output.iterdir()}
    assert not written & set(beside)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"} <= written


def test_tied_embeddings_change_together_and_are_stored_once(save: Save, output: Path) -> None:
    from transformers import AutoModelForCausalLM

    checked = save()
    name = "model.embed_tokens.weight"
    weights = changed(checked, [name])
    write(checked, weights, output)
    verify(checked, weights, output)
    assert "lm_head.weight" not in tensors_of(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, weights[name])


def test_a_checkpoint_of_the_bare_decoder_keeps_its_names(
    save: Save, output: Path, tokenizer: Any
) -> None:
    checked = save(tiny_model("olmo", len(tokenizer)).model)
    for name in NAMES:
        assert checked.stored_names[name] == (name.removeprefix("model."),)
    weights = changed(checked)
    write(checked, weights, output)
    assert_only_changed(checked, output, [name.removeprefix("model.") for name in NAMES])
    verify(checked, weights, output)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_two_dtypes_keeps_both(save: Save, output: Path, first: torch.dtype) -> None:
    """Whatever the dtype of the tensor that names the file's own."""
    checked = save()
    path = checked.files.directory / SINGLE
    other = torch.bfloat16 if first == torch.float32 else torch.float32
    tensors = {
        name: tensor.to(first if "layers" not in name else other)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    checked = check_model(str(checked.files.directory))
    weights = changed(checked)
    write(checked, weights, output)
    verify(checked, weights, output)
    assert tensors_of(output)[NAMES[0]].dtype == other


@BOTH_WAYS
def test_verification_finds_a_tensor_that_is_not_what_was_meant(
    save: Save, output: Path, streamed: bool
) -> None:
    checked = save()
    weights = changed(checked)
    write(checked, weights, output)
    tensors = load_file(output / SINGLE)
    other = "model.layers.0.self_attn.q_proj.weight"
    tensors[other][0, 0] += 1e-3
    save_file(tensors, output / SINGLE, metadata={"format": "pt"})
    with pytest.raises(RunError, match=f"tensor {other} reloads with other values than written"):
        verify_checkpoint(checked, weights, output, streamed=streamed)


@BOTH_WAYS
def test_verification_finds_output_that_is_not_finite(save: Save, output: Path, streamed: bool) -> None:
    checked = save()
    name = "model.embed_tokens.weight"
    weights = changed(checked, [name])
    weights[name][50] = 3e38  # finite itself, its logit is not
    write(checked, weights, output)
    with pytest.raises(RunError, match="output is not finite"):
        verify_checkpoint(checked, weights, output, streamed=streamed)


@pytest.mark.parametrize(("dtype", "value"), [("float32", float("nan")), ("float16", 1e6)])
def test_values_that_the_file_cannot_hold_are_refused(
    save: Save, output: Path, dtype: str, value: float
) -> None:
    checked = save(tiny_model("olmo", 400).to(getattr(torch, dtype)))
    weights = changed(checked)
    weights[NAMES[1]][0, 0] = value
    with pytest.raises(RunError, match="holds values that are not finite"):
        write(checked, weights, output)


def test_other_shapes_are_refused(save: Save, output: Path) -> None:
    checked = save()
    with pytest.raises(RunError, match=r"has shape \(2, 2\), the checkpoint \(16, 32\)"):
        write(checked, {NAMES[0]: torch.zeros(2, 2)}, output)


@pytest.mark.parametrize("held", [("lm_head.weight",), ("lm_head.weight", "model.embed_tokens.weight")])
def test_a_tied_tensor_is_replaced_under_every_name_that_the_file_holds(
    save: Save, output: Path, held: tuple[str, ...]
) -> None:
    checked = save()
    path = checked.files.directory / SINGLE
    tensors = load_file(path)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {name: embedding.clone() for name in held}, path, metadata={"format": "pt"})
    checked = check_model(str(checked.files.directory))
    assert set(checked.stored_names["model.embed_tokens.weight"]) == set(held)
    weights = changed(checked, ["model.embed_tokens.weight"])
    write(checked, weights, output)
    verify(checked, weights, output)
    for name in held:
        assert torch.equal(tensors_of(output)[name], weights["model.embed_tokens.weight"])


@BOTH_WAYS
def test_an_own_head_under_a_tied_configuration_stays(save: Save, output: Path, streamed: bool) -> None:
    checked = save()
    path = checked.files.directory / SINGLE
    tensors = load_file(path)
    head = torch.flip(tensors["model.embed_tokens.weight"], [0])
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    checked = check_model(str(checked.files.directory))
    weights = changed(checked)
    write(checked, weights, output)
    verify_checkpoint(checked, weights, output, streamed=streamed)
    assert torch.equal(tensors_of(output)["lm_head.weight"], head)


def test_a_change_that_rounding_undoes_is_told(save: Save, output: Path) -> None:
    checked = save(tiny_model("olmo", 400).to(torch.bfloat16))
    tensors = tensors_of(checked.files.directory)
    weights = {NAMES[0]: tensors[NAMES[0]].float() * (1 + 1e-4)}
    (warning,) = rounding_warnings(write(checked, weights, output))
    assert "rounding to bfloat16" in warning
    assert rounding_warnings(write(checked, changed(checked), output)) == []


def test_a_full_disk_is_told_before_anything_is_written(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save().files
    asked: list[Path] = []
    free = files.bytes + 64 * 2**20

    def usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    target = tmp_path / "not" / "yet" / "there"
    check_disk_space(files, target)
    assert asked == [tmp_path]  # the nearest directory that exists
    free -= 1
    message = refusal(lambda: check_disk_space(files, target))
    assert message.startswith(f"--output {target}: its disk has 64 MiB free, the checkpoint needs")
    assert "free some or choose another disk" in message


def test_the_index_of_a_single_file_is_not_carried_over(save: Save, output: Path) -> None:
    checked = save()
    (checked.files.directory / INDEX).write_text(json.dumps({"weight_map": {"a": "gone"}}))
    write(checked, changed(checked), output)
    assert not (output / INDEX).exists()


def test_every_byte_outside_the_changed_tensors_stays(save: Save, output: Path) -> None:
    """Whatever order and metadata the target's file has, which no library would write again."""
    checked = save()
    path = checked.files.directory / SINGLE
    save_file(load_file(path), path, metadata={"made": "by hand", "format": "pt"})
    checked = check_model(str(checked.files.directory))
    write(checked, changed(checked), output)
    before, after = path.read_bytes(), (output / SINGLE).read_bytes()
    assert len(before) == len(after)
    stored = stored_tensors(path)
    allowed = {
        offset
        for name in NAMES
        for offset in range(stored[name].start, stored[name].start + stored[name].bytes)
    }
    different = {offset for offset in range(len(before)) if before[offset] != after[offset]}
    assert different
    assert different <= allowed


def test_an_interrupted_writing_is_done_again_from_the_target(save: Save, output: Path) -> None:
    checked = save()
    weights = changed(checked)
    first = write(checked, {NAMES[0]: torch.ones(16, 32)}, output)
    again = write_checkpoint(checked, weights, output)
    assert again[0].norm == first[0].norm  # the target's, not the half-written one's
    verify(checked, weights, output)


def test_a_large_model_is_verified_without_loading_it(
    save: Save, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    checked = save()
    weights = changed(checked)
    write(checked, weights, output)
    loaded: list[Path] = []
    original = AutoModelForCausalLM.from_pretrained

    def load(directory: Path, **options: Any) -> Any:
        loaded.append(directory)
        return original(directory, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    verify_checkpoint(checked, weights, output, streamed=True)
    assert loaded == []
    verify_checkpoint(checked, weights, output)
    assert loaded == [output]


@BOTH_WAYS
def test_the_probe_is_the_written_models_and_runs_all_of_it(
    save: Save, output: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import OlmoForCausalLM

    checked = save(shaken(tiny_model("olmo", 400)))
    weights = changed(checked)
    write(checked, weights, output)
    seen: list[torch.Tensor] = []
    original = OlmoForCausalLM.forward

    def forward(self: Any, **inputs: Any) -> Any:
        result = original(self, **inputs)
        seen.append(result.logits)
        return result

    monkeypatch.setattr(OlmoForCausalLM, "forward", forward)
    verify_checkpoint(checked, weights, output, streamed=streamed)
    model = OlmoForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        expected = original(model, input_ids=torch.arange(8)[None]).logits
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_a_loader_that_changes_a_tensor_is_found(
    save: Save, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    checked = save()
    weights = changed(checked)
    write(checked, weights, output)
    original = AutoModelForCausalLM.from_pretrained

    def load(directory: Path, **options: Any) -> Any:
        model = original(directory, **options)
        model.get_parameter(NAMES[1]).data[0, 0] += 1
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(RunError, match=f"tensor {NAMES[1]} reloads with other values"):
        verify_checkpoint(checked, weights, output)


def test_the_disk_must_hold_the_cache_too(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save().files
    free = files.bytes + 164 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_disk_space(files, tmp_path / "out", beside=100 * 2**20)
    message = refusal(lambda: check_disk_space(files, tmp_path / "out", beside=100 * 2**20 + 1))
    assert "and 100 MiB until the run ends" in message
