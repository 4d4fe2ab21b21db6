"""What is checked of a checkpoint before a weight is read, and how each fault is said."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import refusal, tiny_model
from expunge.models.files import INDEX, SINGLE, check_model_files
from expunge.models.loading import check_model


@pytest.fixture
def copied(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir("olmo"), tmp_path / "model"))


@pytest.fixture
def sharded(copied: Path) -> Path:
    (copied / SINGLE).unlink()
    tiny_model("olmo", 400).save_pretrained(copied, max_shard_size="20KB")
    return copied


def truncate(directory: Path) -> None:
    with (directory / SINGLE).open("r+b") as file:
        file.truncate(5000)


def overwrite(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def remove(*names: str) -> Callable[[Path], None]:
    def mutate(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return mutate


def pickle_only(directory: Path) -> None:
    (directory / SINGLE).unlink()
    torch.save({}, directory / "pytorch_model.bin")


FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no directory": (shutil.rmtree, ("no such model directory", "config.json")),
    "no config": (remove("config.json"), ("has no config.json", "saved model")),
    "no weights": (remove(SINGLE), (f"has no {SINGLE}", "saved model")),
    "pickle only": (pickle_only, ("pickled weights only", "save_pretrained to safetensors")),
    "truncated": (truncate, (SINGLE, "not a whole safetensors file")),
    "text": (overwrite(SINGLE, "hello"), (SINGLE, "not a whole safetensors file")),
    "no tokenizer": (remove("tokenizer.json"), ("has no tokenizer", "save_pretrained")),
    "broken tokenizer": (overwrite("tokenizer.json", "{"), ("tokenizer does not load",)),
    "broken config": (overwrite("config.json", "{"), ("config.json", "not a valid JSON")),
    "unknown family": (overwrite("config.json", '{"model_type": "zyx"}'), ("config.json", "zyx")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_the_directory_or_file_and_the_mend(fault: str, copied: Path) -> None:
    mutate, words = FAULTS[fault]
    mutate(copied)
    message = refusal(lambda: check_model(str(copied)))
    assert message.startswith(str(copied))
    for word in words:
        assert word in message


@pytest.mark.parametrize("layers", [100_000, 10**9, 1e9, float("inf")])
def test_more_layers_than_tensors_are_refused_before_a_model_is_made(
    layers: float, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((copied / "config.json").read_text())
    monkeypatch.setattr("expunge.models.loading.skeleton_of", lambda *_, **__: pytest.fail("made"))
    for changed in (config | {"num_hidden_layers": layers}, {"text_config": {"n_layer": layers}}):
        (copied / "config.json").write_text(json.dumps(changed))
        message = refusal(lambda: check_model(str(copied)))
        assert message.startswith(f"{copied / 'config.json'}: says {layers} layers, but the files")


def test_a_missing_shard_is_named_and_counted(sharded: Path) -> None:
    names = sorted(set(json.loads((sharded / INDEX).read_text())["weight_map"].values()))
    (sharded / names[1]).unlink()
    message = refusal(lambda: check_model_files(sharded))
    missing = f"{sharded}: 1 of {len(names)} shards are missing, first {names[1]}"
    assert message == f"{missing}; fetch them"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "is not a valid JSON file"),
        ("[" * 100_000, "is not a valid JSON file"),
        ("[]", "holds no JSON object"),
        ('{"weight_map": []}', "is not a safetensors index"),
        ("{}", "is not a safetensors index"),
        ('{"weight_map": {"a": 3}}', "3 is not the name of a file beside it"),
        ('{"weight_map": {"a": ["b"]}}', "is not the name of a file beside it"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "is not the name of a file beside it"),
        ('{"weight_map": {"a": "sub/b.safetensors"}}', "save the model again with save_pretrained"),
        ('{"weight_map": {"a": ".."}}', "1 of 1 shards are missing"),
    ],
)
def test_a_broken_index_is_named(sharded: Path, text: str, found: str) -> None:
    (sharded / INDEX).write_text(text)
    message = refusal(lambda: check_model_files(sharded))
    assert message.startswith(f"{sharded}")
    assert found in message


def test_a_single_file_comes_before_shards_as_in_transformers(sharded: Path) -> None:
    save_file({"a": torch.zeros(1)}, sharded / SINGLE)
    assert list(check_model_files(sharded).tensors) == ["a"]


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    assert refusal(lambda: check_model_files(sharded)).startswith(f"{shard}: is not a whole")


def test_each_tensor_is_found_in_its_shard(sharded: Path) -> None:
    files = check_model_files(sharded)
    assert len(files.shards) > 2
    for shard in files.shards:
        assert set(load_file(shard)) == {
            n for n, tensor in files.tensors.items() if tensor.path == shard
        }
    assert files.bytes == sum(path.stat().st_size for path in sharded.glob("model-*.safetensors"))


def test_fingerprints_are_of_the_model_and_its_tokenizer_only(copied: Path) -> None:
    for name in ("forget.jsonl", "notes.txt", "optimizer.bin"):
        (copied / name).write_text("x")
    digests = check_model_files(copied).sha256()
    assert {SINGLE, "config.json", "tokenizer.json"} <= set(digests)
    assert not {"forget.jsonl", "notes.txt", "optimizer.bin"} & set(digests)
    for name, digest in digests.items():
        assert digest == hashlib.sha256((copied / name).read_bytes()).hexdigest()
