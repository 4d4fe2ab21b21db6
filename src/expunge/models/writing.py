"""Writing an unlearned checkpoint: the target's files with the changed tensors replaced."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from expunge.errors import InputError, RunError
from expunge.models.files import INDEX, SINGLE, ModelFiles
from expunge.models.loading import CheckedModel

_MARGIN = 64 * 2**20


@dataclass(frozen=True)
class TensorChange:
    """What happened to one tensor, as written in the checkpoint's dtype."""

    name: str
    dtype: str
    norm: float
    """Frobenius norm before."""
    change_norm: float
    """Frobenius norm of the change as written."""
    rounding_norm: float
    """Frobenius norm of what the cast to the checkpoint's dtype lost."""
    changed_share: float
    """Share of the elements that differ from before."""


def check_disk_space(files: ModelFiles, output: Path) -> None:
    """Raises InputError where the output's disk cannot take a second copy of the model."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < files.bytes + _MARGIN:
        raise InputError(
            f"--output {output}: its disk has {free / 2**20:.0f} MiB free, the checkpoint needs"
            f" {(files.bytes + _MARGIN) / 2**20:.0f} MiB; free some or choose another disk"
        )


def checkpoint_names(files: ModelFiles, names: list[str]) -> dict[str, str]:
    """The name in the checkpoint for each name in the model. Raises RunError where there is none.

    They differ where a checkpoint was saved from the bare decoder, without the prefix of the LM.
    """
    found = {}
    for name in names:
        stripped = name.split(".", 1)[1] if "." in name else name
        candidates = [candidate for candidate in (name, stripped) if candidate in files.shard_of]
        if not candidates:
            raise RunError(f"{files.directory}: holds no tensor {name}, so it cannot be replaced")
        found[name] = candidates[0]
    return found


def write_checkpoint(
    files: ModelFiles, weights: Mapping[str, torch.Tensor], directory: Path
) -> list[TensorChange]:
    """Writes the model with `weights` (float32, by name) in place of its own into `directory`.

    Each is cast to the dtype that the checkpoint holds it in, once. Files without a changed tensor
    are copied.
    """
    names = {stored: name for name, stored in checkpoint_names(files, list(weights)).items()}
    changes = []
    for shard in files.shards:
        if not any(files.shard_of[stored] == shard for stored in names):
            shutil.copyfile(shard, directory / shard.name)
            continue
        tensors = {}
        with safe_open(shard, framework="pt") as opened:
            metadata = opened.metadata()
            for stored in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_tensor(stored)
                if stored in names:
                    replaced, change = _replaced(stored, tensor, weights[names[stored]])
                    tensors[stored] = replaced
                    changes.append(change)
                else:
                    tensors[stored] = tensor
        save_file(tensors, directory / shard.name, metadata=metadata)
    if all(shard.name != SINGLE for shard in files.shards):
        shutil.copyfile(files.directory / INDEX, directory / INDEX)
    for companion in files.companions():
        shutil.copyfile(companion, directory / companion.name)
    return changes


def verify_checkpoint(
    checked: CheckedModel, weights: Mapping[str, torch.Tensor], directory: Path
) -> None:
    """Reloads the written checkpoint the way its users will and compares every tensor.

    Raises RunError where a tensor is not what was meant to be written, or the model's output on a
    fixed probe is not finite.
    """
    from transformers import AutoModelForCausalLM

    stored = {
        name: _stored_dtype(checked.files, where)
        for name, where in checkpoint_names(checked.files, list(weights)).items()
    }
    dtype = _stored_dtype(checked.files, next(iter(checked.files.shard_of)))
    options: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": checked.trust_remote_code,
    }
    reloaded = AutoModelForCausalLM.from_pretrained(directory, **options)
    before = AutoModelForCausalLM.from_pretrained(checked.files.directory, **options)
    expected = dict(before.state_dict())
    tied = _storages(before)
    for name, weight in weights.items():
        for alias in tied[expected[name].data_ptr()]:
            expected[alias] = weight.to(stored[name]).to(dtype)
    for name, tensor in reloaded.state_dict().items():
        if not torch.equal(tensor, expected[name]):
            raise RunError(f"{directory}: tensor {name} reloads with other values than written")
    probe = torch.arange(min(8, checked.config.vocab_size))[None]
    with torch.no_grad():
        if not torch.isfinite(reloaded.float()(input_ids=probe).logits).all():
            raise RunError(f"{directory}: the reloaded model's output is not finite")


def describe(changes: list[TensorChange]) -> list[dict[str, Any]]:
    """The manifest's list of changed tensors."""
    return [asdict(change) for change in changes]


def _replaced(name: str, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, TensorChange]:
    if old.shape != new.shape:
        raise RunError(f"{name}: has shape {tuple(new.shape)}, the checkpoint {tuple(old.shape)}")
    written = new.to(old.dtype).contiguous()
    if not torch.isfinite(written).all():
        raise RunError(f"{name}: holds values that are not finite; nothing was written")
    return written, TensorChange(
        name=name,
        dtype=str(old.dtype).removeprefix("torch."),
        norm=float(old.float().norm()),
        change_norm=float((written.float() - old.float()).norm()),
        rounding_norm=float((written.float() - new.float()).norm()),
        changed_share=float((written != old).float().mean()),
    )


def _stored_dtype(files: ModelFiles, name: str) -> torch.dtype:
    with safe_open(files.shard_of[name], framework="pt") as opened:
        return opened.get_tensor(name).dtype


def _storages(model: torch.nn.Module) -> dict[int, list[str]]:
    """Names by storage, so that tied tensors change together."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict().items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    return names
