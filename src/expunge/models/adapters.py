"""A directory with a LoRA adapter only: its base's tensors, with the adapter added as they are read.

W + scale * B @ A in float32, cast once to the dtype that the base is held in (arXiv 2106.09685): what
PEFT's merge_and_unload and save_pretrained would write, without a merged copy on disk or in memory.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.errors import InputError
from expunge.models.decoder import DecoderLayout
from expunge.models.files import ADAPTER, ADAPTER_CONFIG, ModelFiles, read_json
from expunge.models.tensors import LowRank, StoredTensor, stored_tensors

if TYPE_CHECKING:
    from peft import LoraConfig

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin a training that leave the base's weights as they were."""
_PLAIN = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "eva_config", "modules_to_save", "bias",
}  # fmt: skip
"""Fields that a plain adapter may set; tensors that the last two save are refused by name."""
_MEND = "merge it with PEFT's merge_and_unload and give the model that save_pretrained writes"


def find_adapter(directory: Path) -> LoraConfig | None:
    """Settings of the adapter in a directory without a model of its own; None for any other directory.

    Raises InputError for an adapter that is more than low-rank additions to linear maps.
    """
    path = directory / ADAPTER_CONFIG
    if not path.is_file() or any(directory.glob("model*.safetensors*")):
        return None
    from peft import LoraConfig, PeftConfig

    if not (directory / ADAPTER).is_file():
        raise InputError(f"{directory}: has no {ADAPTER}; save the adapter again as safetensors")
    said = read_json(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of fields that are seen below
            config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # a field of another type, or of a newer PEFT
        raise InputError(f"{path}: PEFT does not read it ({type(error).__name__}); {_MEND}") from None
    usual = LoraConfig().to_dict()
    known = said | config.to_dict()
    more = {key for key, value in known.items() if value and value != usual.get(key)} - _PLAIN
    if not isinstance(config, LoraConfig) or more:
        field = "peft_type" if "peft_type" in more else min(more)
        raise InputError(f"{path}: {field} makes it another thing than plain LoRA; {_MEND}")
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights {config.init_lora_weights!r} changes the base's weights; {_MEND}"
        )
    if not config.base_model_name_or_path:
        raise InputError(f"{path}: names no base model; write it to base_model_name_or_path")
    return config


def with_adapter(
    files: ModelFiles,
    adapter: Path,
    config: LoraConfig,
    layout: DecoderLayout,
    stored_names: Mapping[str, tuple[str, ...]],
) -> ModelFiles:
    """The base's files with the adapter's products (of the directory `adapter`) added to their tensors.

    Raises InputError for a tensor of the adapter that belongs to no linear map of a decoder layer.
    """
    path = adapter / ADAPTER
    parts = stored_tensors(path)
    tensors = dict(files.tensors)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, part in parts.items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        if (
            factor not in ("A.weight", "B.weight")
            or not module.startswith(f"{layout.layers}.")
            or not stored_names.get(f"{module}.weight")
        ):
            raise InputError(
                f"{path}: {name} is no low-rank factor of a linear map in a layer of the base; {_MEND}"
            )
        pairs.setdefault(module, {})[factor[0]] = part
    for module, pair in pairs.items():
        (held,) = stored_names[f"{module}.weight"]
        weight = tensors[held]
        added = _added(config, module, pair)
        if added is None or weight.shape != added.shape:
            raise InputError(
                f"{path}: its factors of {module} do not fit the base's {weight.shape}; give the base"
                " that it was trained on"
            )
        tensors[held] = dataclasses.replace(weight, added=added)
    return dataclasses.replace(files, tensors=tensors, adapter=(path, adapter / ADAPTER_CONFIG))


def _added(config: LoraConfig, module: str, pair: Mapping[str, StoredTensor]) -> LowRank | None:
    """None where the factors do not go together."""
    from peft.utils.other import get_pattern_key

    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return None
    rank = a.shape[0]
    alpha = config.alpha_pattern.get(
        get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha
    )
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return LowRank(a, b, scale, config.fan_in_fan_out)
