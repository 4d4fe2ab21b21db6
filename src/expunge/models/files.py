"""The files of a checkpoint, checked before anything is loaded. Safetensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expunge.data.formats import sha256_of
from expunge.errors import InputError
from expunge.models.tensors import StoredTensor, stored_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
"""What is copied beside the weights. A list, not a pattern: a model's directory may hold rows too."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelFiles:
    """A local checkpoint: its shards and where in them each tensor is."""

    directory: Path
    shards: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in self.shards)

    def companions(self, *, code: bool = False) -> list[Path]:
        """The configuration, tokenizer and licence files that are there; with `code` its modules."""
        named = [self.directory / name for name in COMPANIONS]
        modules = sorted(self.directory.glob("*.py")) if code else []
        return [path for path in [*named, *modules] if path.is_file()]

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file that makes up the model and its tokenizer."""
        return {path.name: sha256_of(path) for path in [*self.shards, *self.companions()]}


def check_model_files(directory: Path) -> ModelFiles:
    """Checks that `directory` holds a configuration, a tokenizer and whole safetensors weights.

    Only headers are read. Raises InputError.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory; give the folder with config.json")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: has no config.json; give the folder of a saved model")
    shards = _shards(directory)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"{directory}: has no tokenizer; save it there with tokenizer.save_pretrained"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        tensors |= stored_tensors(shard)
    return ModelFiles(directory, shards, tensors)


def _shards(directory: Path) -> tuple[Path, ...]:
    # Where both are there, from_pretrained takes the single file.
    if (directory / SINGLE).is_file():
        return (directory / SINGLE,)
    if (directory / INDEX).is_file():
        try:
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{directory / INDEX}: is not a safetensors index") from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise InputError(
                f"{directory}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}"
            )
        return tuple(directory / name for name in names)
    if any(next(directory.glob(pattern), None) for pattern in _PICKLES):
        raise InputError(
            f"{directory}: holds pickled weights only, which can run code when read;"
            " convert them with save_pretrained to safetensors"
        )
    raise InputError(f"{directory}: has no {SINGLE}; give the folder of a saved model")
