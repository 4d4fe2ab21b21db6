"""Writing an unlearned checkpoint: the target's files with the changed tensors replaced."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path

import torch

from expunge.disk import nearest, settle
from expunge.errors import InputError, RunError
from expunge.models.files import INDEX, SINGLE, ModelFiles
from expunge.models.loading import CheckedModel, check_model
from expunge.models.parts import StreamedModel, loaded_in_turn, outside_layers
from expunge.models.tensors import StoredTensor, overwrite_tensor, read_tensor, stored_tensors

_MARGIN = 64 * 2**20
_OTHER = "reloads with other values than written; the disk may be faulty, choose another"


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


def check_disk_space(files: ModelFiles, output: Path, beside: int = 0) -> None:
    """Raises InputError where the output's disk cannot take a second copy of the model.

    `beside` is what the run needs there until it ends, in bytes.
    """
    free = shutil.disk_usage(nearest(output.absolute().parent)).free
    needed = files.bytes + beside + _MARGIN
    if free < needed:
        scratch = f" and {beside / 2**20:.0f} MiB until the run ends" if beside else ""
        raise InputError(
            f"--output {output}: its disk has {free / 2**20:.0f} MiB free, the checkpoint needs"
            f" {(files.bytes + _MARGIN) / 2**20:.0f} MiB{scratch}; free some or choose another disk"
        )


def copy_target(checked: CheckedModel, directory: Path) -> None:
    """Copies the target's weights, configuration and tokenizer, for `write_checkpoint` to change."""
    files = checked.files
    copied = [*files.shards, *files.companions()]
    if all(shard.name != SINGLE for shard in files.shards):
        copied.append(files.directory / INDEX)
    for source in copied:
        shutil.copyfile(source, directory / source.name)
        settle(directory / source.name)


def close_as(files: ModelFiles, directory: Path) -> None:
    """Opens the result, and the files in it, to nobody to whom the target is closed."""
    closed = ~files.directory.stat().st_mode & 0o077
    directory.chmod(stat.S_IMODE(directory.stat().st_mode) & ~closed)
    closed = reduce(or_, (~shard.stat().st_mode & 0o077 for shard in files.shards))
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~closed)


def write_checkpoint(
    checked: CheckedModel, weights: Mapping[str, torch.Tensor], directory: Path
) -> list[TensorChange]:
    """Puts `weights` (float32, by name) over their own in the copy of the target in `directory`.

    Each is cast to the dtype that the checkpoint holds it in, once; every other byte stays.
    """
    names = {stored: name for name in weights for stored in checked.stored_names[name]}
    copies = _written(checked, directory)
    changes = []
    for stored, original in checked.files.tensors.items():
        if stored in names:
            new = weights[names[stored]]
            replaced, change = _replaced(stored, read_tensor(original), new)
            overwrite_tensor(copies[stored], replaced)
            changes.append(change)
        elif original.added is not None:
            overwrite_tensor(copies[stored], read_tensor(original))
    return changes


def _written(checked: CheckedModel, directory: Path) -> dict[str, StoredTensor]:
    """The tensors of the copy of a target in `directory`."""
    written: dict[str, StoredTensor] = {}
    for shard in checked.files.shards:
        written |= stored_tensors(directory / shard.name)
    return written


def verify_checkpoint(
    checked: CheckedModel,
    weights: Mapping[str, torch.Tensor],
    directory: Path,
    *,
    streamed: bool = False,
) -> None:
    """Reloads the written checkpoint, compares every tensor, and runs it on a fixed probe.

    As a whole, the way its users will; or, for a model that need not fit in memory, layer by layer.
    The unchanged tensors are compared with the target's files. Raises RunError where a tensor is
    not what was meant to be written, or the output is not finite.
    """
    _verify_files(checked, weights, directory)
    try:
        reloaded = check_model(str(directory), trust_remote_code=checked.trust_remote_code)
    except InputError as error:
        raise RunError(f"the written checkpoint does not load: {error}") from None
    finite = _streamed_probe if streamed else _whole_probe
    if not finite(reloaded):
        raise RunError(
            "the reloaded checkpoint's output is not finite, nothing was written; save the target in"
            " float32 or lower --learning-rate"
        )


def _verify_files(checked: CheckedModel, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Compares what was written with what was meant, tensor by tensor."""
    names = {stored: name for name in weights for stored in checked.stored_names[name]}
    written = _written(checked, directory)
    for stored, original in checked.files.tensors.items():
        expected = read_tensor(original)
        if stored in names:
            expected = weights[names[stored]].to("cpu", expected.dtype)
        found = read_tensor(written[stored])
        if not torch.equal(_bytes_of(found), _bytes_of(expected)):
            raise RunError(f"tensor {stored} {_OTHER}")


def _whole_probe(reloaded: CheckedModel) -> bool:
    from transformers import AutoModelForCausalLM

    written = reloaded.files.tensors
    # Not with the configuration as it was checked: its users have but the directory.
    model = AutoModelForCausalLM.from_pretrained(
        reloaded.files.directory,
        dtype=next(iter(written.values())).dtype,
        use_safetensors=True,
        trust_remote_code=reloaded.trust_remote_code,
    ).eval()
    for name, tensor in model.named_parameters():
        expected = read_tensor(written[reloaded.stored_names[name][0]])
        if not torch.equal(tensor, expected.to(tensor.dtype)):
            raise RunError(f"tensor {name} {_OTHER}")
    with torch.no_grad():
        return bool(torch.isfinite(model(input_ids=_probe(reloaded)).logits).all())


def _streamed_probe(reloaded: CheckedModel) -> bool:
    stored = next(iter(reloaded.files.tensors.values()))
    parts = StreamedModel(reloaded, stored.dtype, "cpu")
    layers = [f"{reloaded.layout.layers}.{index}" for index in range(reloaded.layout.count)]
    with torch.no_grad(), loaded_in_turn(parts, [*outside_layers(parts.model, layers), *layers]):
        logits = parts.model(input_ids=_probe(reloaded), use_cache=False).logits
    return bool(torch.isfinite(logits).all())


def _probe(checked: CheckedModel) -> torch.Tensor:
    return torch.arange(min(8, checked.config.get_text_config().vocab_size))[None]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """For a comparison in which one NaN equals the same NaN."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def rounding_warnings(changes: Sequence[TensorChange]) -> list[str]:
    """Says where the cast to the checkpoint's dtype undid much of what was trained."""
    lost = [change.name for change in changes if change.rounding_norm > 0.5 * change.change_norm]
    if not lost:
        return []
    return [
        f"{len(lost)} of {len(changes)} changed tensors lost more than half of their change to"
        f" rounding to {changes[0].dtype} (first {lost[0]}). The saved model may remember more than"
        " the candidates did: evaluate it, or save the target in float32 and run again"
    ]


def _replaced(name: str, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, TensorChange]:
    if old.shape != new.shape:
        raise RunError(f"{name}: has shape {tuple(new.shape)}, the checkpoint {tuple(old.shape)}")
    written = new.to(old.dtype, copy=True).contiguous()  # two names of a tied tensor share none
    if not torch.isfinite(written).all():
        raise RunError(
            f"{name}: holds values that are not finite, nothing was written; save the target in float32"
            " or lower --learning-rate"
        )
    return written, TensorChange(
        name=name,
        dtype=str(old.dtype).removeprefix("torch."),
        norm=float(old.float().norm()),
        change_norm=float((written.float() - old.float()).norm()),
        rounding_norm=float((written.float() - new.float()).norm()),
        changed_share=float((written != old).float().mean()),
    )
