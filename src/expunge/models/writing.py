"""Writing an unlearned checkpoint: the target's files with the changed tensors replaced."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
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


def write_checkpoint(
    checked: CheckedModel, weights: Mapping[str, torch.Tensor], directory: Path
) -> list[TensorChange]:
    """Writes the model with `weights` (float32, by name) in place of its own into `directory`.

    Each is cast to the dtype that the checkpoint holds it in, once. Files without a changed tensor
    are copied.
    """
    files = checked.files
    names = {stored: name for name in weights for stored in checked.stored_names[name]}
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
    for companion in files.companions(code=checked.trust_remote_code):
        shutil.copyfile(companion, directory / companion.name)
    return changes


def verify_checkpoint(
    checked: CheckedModel, weights: Mapping[str, torch.Tensor], directory: Path
) -> None:
    """Reloads the written checkpoint the way its users will and compares every tensor.

    The unchanged ones are compared with the target's files, one at a time. Raises RunError where a
    tensor is not what was meant to be written, or the output on a fixed probe is not finite.
    """
    from transformers import AutoModelForCausalLM

    files = checked.files
    dtype = _read(files, next(iter(files.shard_of))).dtype
    reloaded = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=checked.trust_remote_code,
    ).eval()
    for name, tensor in reloaded.named_parameters():
        expected = _read(files, checked.stored_names[name][0])
        if name in weights:
            expected = weights[name].to(expected.dtype)
        if not torch.equal(tensor, expected.to(tensor.dtype)):
            raise RunError(f"tensor {name} reloads with other values than written")
    probe = torch.arange(min(8, checked.config.vocab_size))[None]
    with torch.no_grad():
        if not torch.isfinite(reloaded(input_ids=probe).logits).all():
            raise RunError("the reloaded checkpoint's output is not finite; nothing was written")


def rounding_warnings(changes: Sequence[TensorChange]) -> list[str]:
    """Says where the cast to the checkpoint's dtype undid much of what was trained."""
    lost = [change.name for change in changes if change.rounding_norm > 0.5 * change.change_norm]
    if not lost:
        return []
    return [
        f"{len(lost)} of {len(changes)} changed tensors lost more than half of their change to"
        f" rounding to {changes[0].dtype} (first {lost[0]}): the saved model may remember more than"
        " the candidates did. Evaluate it, or save the target in float32 and run again"
    ]


def describe(changes: list[TensorChange]) -> list[dict[str, Any]]:
    """The manifest's list of changed tensors."""
    return [asdict(change) for change in changes]


def _replaced(name: str, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, TensorChange]:
    if old.shape != new.shape:
        raise RunError(f"{name}: has shape {tuple(new.shape)}, the checkpoint {tuple(old.shape)}")
    written = new.to(old.dtype, copy=True).contiguous()  # two names of a tied tensor share none
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


def _read(files: ModelFiles, stored: str) -> torch.Tensor:
    with safe_open(files.shard_of[stored], framework="pt") as opened:
        return opened.get_tensor(stored)
