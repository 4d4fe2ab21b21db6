"""The files of a checkpoint, checked before anything is loaded. Safetensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.formats import sha256_of
from expunge.errors import InputError
from expunge.models.tensors import StoredTensor, stored_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "expunge.json"
"""The record of a run, in the directory of its result."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
_OF_MODEL = ("config.json", "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE")
_OF_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""What is copied beside the weights. Lists, not patterns: a model's directory may hold rows too."""
_DEQUANTISED = {
    "bitsandbytes": "load it and call model.dequantize()",
    "compressed-tensors": "load it with CompressedTensorsConfig(run_compressed=False)",
    "fp8": "load it with FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "load it with Mxfp4Config(dequantize=True)",
}
"""How Transformers makes full weights of a quantised checkpoint, by method."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelFiles:
    """A local checkpoint: its shards and where in them each tensor is."""

    directory: Path
    shards: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    tokenizer: Path
    """The directory that holds the tokenizer: an adapter may bring one of its own."""
    adapter: tuple[Path, ...] = ()
    """Weights and configuration of an adapter that is added to the tensors as they are read."""

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in self.shards)

    @property
    def weights(self) -> tuple[Path, ...]:
        """Every file that the weights are made of."""
        return (*self.shards, *self.adapter[:1])

    def companions(self) -> list[Path]:
        """The configuration, tokenizer and licence files that are there, and the code they name."""
        named = [self.directory / name for name in _OF_MODEL]
        named += [self.tokenizer / name for name in _OF_TOKENIZER]
        modules = {path for place in (self.directory, self.tokenizer) for path in code_of(place)}
        return [path for path in [*named, *sorted(modules)] if path.is_file()]

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file that makes up the model and its tokenizer."""
        return {path.name: sha256_of(path) for path in [*self.shards, *self.adapter, *self.companions()]}


def code_of(directory: Path) -> list[Path]:
    """The modules that a directory's configurations name in `auto_map`, with those they import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    names: set[str] = set()
    for file in ("config.json", "tokenizer_config.json"):
        path = directory / file
        mapped = read_json(path).get("auto_map") if path.is_file() else None
        classes = mapped.values() if isinstance(mapped, dict) else ()
        # A tokenizer's entry lists a slow and a fast class; another repository's code stays there.
        names |= {
            each.partition(".")[0]
            for entry in classes
            for each in (entry if isinstance(entry, list) else [entry])
            if isinstance(each, str) and "--" not in each
        }
    found = [directory / f"{name}.py" for name in sorted(names) if name.isidentifier()]
    there = [path for path in found if path.is_file()]
    imported = [Path(each) for path in there for each in get_relative_import_files(path)]
    return list(dict.fromkeys([*there, *(path for path in imported if path.is_file())]))


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file. Raises InputError for anything else."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the one that was saved")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"{path}{line}: is not a valid JSON file ({type(error).__name__}); give the one that was"
            " saved"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object; give the one that was saved")
    return found


def check_model_files(directory: Path, adapter: Path | None = None) -> ModelFiles:
    """Checks that `directory` holds a configuration, a tokenizer and whole safetensors weights.

    `adapter` is a directory with an adapter to the weights, and perhaps a tokenizer of its own. Only
    headers are read. Raises InputError.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory; give the folder with config.json")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: has no config.json; give the folder of a saved model")
    _refuse_quantised(directory)
    shards = _shards(directory)
    if (directory / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{directory}: holds a whole model and {ADAPTER_CONFIG}, and libraries load either; move the"
            " adapter's files to a directory of its own"
        )
    places = [place for place in (adapter, directory) if place is not None]
    own = [p for p in places if any((p / name).is_file() for name in _TOKENIZER_FILES)]
    if not own:
        raise InputError(f"{directory}: has no tokenizer; save it there with tokenizer.save_pretrained")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        tensors |= stored_tensors(shard)
    return ModelFiles(directory, shards, tensors, own[0])


def _refuse_quantised(directory: Path) -> None:
    """Raises InputError for a checkpoint that holds codes in the place of weights."""
    path = directory / "config.json"
    config = read_json(path)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        quantised = part.get("quantization_config") or part.get("compression_config")
        if not quantised:
            continue
        facts = quantised if isinstance(quantised, dict) else {}
        bits = next((n for n in (4, 8) if facts.get(f"load_in_{n}bit")), facts.get("bits"))
        method = str(facts.get("quant_method") or ("bitsandbytes" if bits else "unknown method"))
        mend = _DEQUANTISED.get(method)
        raise InputError(
            f"{path}: the checkpoint is quantised ({method}{f', {bits} bits' if bits else ''}); give"
            f" the one from before quantisation{f', or {mend} and save_pretrained' if mend else ''}"
        )


def _shards(directory: Path) -> tuple[Path, ...]:
    # Where both are there, from_pretrained takes the single file.
    if (directory / SINGLE).is_file():
        return (directory / SINGLE,)
    if (directory / INDEX).is_file():
        mapped = read_json(directory / INDEX).get("weight_map")
        if not isinstance(mapped, dict) or not mapped:
            raise InputError(
                f"{directory / INDEX}: is not a safetensors index; save the model again with"
                " save_pretrained"
            )
        # A name with folders in it could be anywhere.
        wrong = [name for name in mapped.values() if name != Path(str(name)).name]
        if wrong:
            raise InputError(
                f"{directory / INDEX}: {wrong[0]!r} is not the name of a file beside it; save the model"
                " again with save_pretrained"
            )
        names = sorted(set(mapped.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise InputError(
                f"{directory}: {len(missing)} of {len(names)} shards are missing, first {missing[0]};"
                " fetch them"
            )
        return tuple(directory / name for name in names)
    if any(next(directory.glob(pattern), None) for pattern in _PICKLES):
        raise InputError(
            f"{directory}: holds pickled weights only, which can run code when read;"
            " convert them with save_pretrained to safetensors"
        )
    raise InputError(f"{directory}: has no {SINGLE}; give the folder of a saved model")
