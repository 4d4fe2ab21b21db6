"""Loading models and tokenizers: safetensors only, dtype always passed, code only when trusted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from expunge.errors import InputError, is_failure
from expunge.models.adapters import find_adapter, with_adapter
from expunge.models.decoder import SUPPORTED, DecoderLayout, find_layout, skeleton_of
from expunge.models.files import (
    ADAPTER_CONFIG,
    ModelFiles,
    check_model_files,
    read_json,
)
from expunge.models.kernels import quick_dtype
from expunge.models.rope import keep_rows_apart
from expunge.models.tensors import check_finite, read_tensor
from expunge.models.text_forms import context_of
from expunge.terminal import native_lines_dropped

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_HUB_FILES = [
    "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*",
]  # fmt: skip
_MOST_IDS = 2**31
Dtype = Literal["float32", "bfloat16", "float16"]
AnyDtype = Literal["auto", "float32", "bfloat16", "float16"]
RunDtype = Literal["auto", "float32", "bfloat16"]
"""Of a run: gradients overflow in float16."""


@dataclass(frozen=True)
class CheckedModel:
    """A model that is known to load: its files, configuration, layout and tokenizer."""

    name: str
    files: ModelFiles
    config: PretrainedConfig
    layout: DecoderLayout
    tokenizer: PreTrainedTokenizerBase
    stored_names: Mapping[str, tuple[str, ...]]
    """For every parameter the names that its files hold it by; tied ones may be there twice."""
    trust_remote_code: bool

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""
        return context_of(self.config)


def check_model(name: str, *, trust_remote_code: bool = False) -> CheckedModel:
    """Everything that can be checked without reading weights.

    `name` is a directory or a hub id. Raises InputError.
    """
    from transformers import AutoConfig, AutoTokenizer

    directory = _directory(name)
    lora = find_adapter(directory)
    adapter = None if lora is None else directory
    if lora is not None:
        directory = _base_of(directory, lora)
    files = check_model_files(directory, adapter)
    _check_depth(directory / "config.json", files)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # the libraries raise many types for a wrong value
        raise InputError(f"{directory / 'config.json'}: {_why(error)}") from None
    try:
        skeleton = skeleton_of(config, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{directory / 'config.json'}: transformers makes no model of it"
            f" ({type(error).__name__}: {_first_line(error)}); give the one that was saved with it"
        ) from None
    layout = find_layout(skeleton)
    stored_names = _stored_names(skeleton, files)
    if _hold_different(stored_names, files):
        # What from_pretrained finds apart it does not tie, whatever the configuration says.
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        skeleton = skeleton_of(config, trust_remote_code=trust_remote_code)
        stored_names = _stored_names(skeleton, files)
    _check_shapes(skeleton, layout, files, stored_names)
    if adapter is not None and lora is not None:
        files = with_adapter(files, adapter, lora, layout, stored_names)
    try:
        with native_lines_dropped():
            tokenizer = AutoTokenizer.from_pretrained(
                files.tokenizer, trust_remote_code=trust_remote_code
            )
            tokenizer("x")
    except BaseException as error:
        if not is_failure(error):
            raise
        raise InputError(
            f"{files.tokenizer}: its tokenizer does not load ({_why(error)}); give the one that was"
            " saved with the model"
        ) from None
    _check_generation(files.directory / "generation_config.json")
    return CheckedModel(name, files, config, layout, tokenizer, stored_names, trust_remote_code)


def check_base(name: str, target: CheckedModel) -> CheckedModel:
    """The model that a target was fine-tuned from, with the target's tokenizer. No weights are read.

    Raises InputError that says what differs where the target cannot have been made of it.
    """
    if name == target.name:
        return target
    base = check_model(name, trust_remote_code=target.trust_remote_code)
    ours, theirs = (_traits(each) for each in (base, target))
    for what in sorted({*ours, *theirs}):
        one, other = (side.get(what) for side in (ours, theirs))
        if one != other:
            raise InputError(
                f"--base {name}: its {what} is {one}, that of {target.name} is {other}; give the model"
                " that this one was fine-tuned from"
            )
    ids = target.tokenizer.get_vocab()
    if moved := {*base.tokenizer.get_vocab().items()} ^ {*ids.items()}:
        raise InputError(
            f"--base {name}: its vocabulary is not that of {target.name} ({len(moved)} tokens differ);"
            " give the model that this one was fine-tuned from"
        )
    files = replace(base.files, tokenizer=target.files.tokenizer)
    return replace(base, files=files, tokenizer=target.tokenizer)


def _traits(checked: CheckedModel) -> dict[str, object]:
    """What a model and those that were fine-tuned from it have in common, beside the vocabulary."""
    skeleton = skeleton_of(checked.config, trust_remote_code=checked.trust_remote_code)
    shapes = {f"shape of {n}": tuple(p.shape) for n, p in skeleton.named_parameters()}
    kind = {"architecture": checked.config.model_type, "number of layers": checked.layout.count}
    return {**kind, **shapes}


def _check_generation(path: Path) -> None:
    """Raises InputError for token ids that are none: libraries take them as they are."""
    for name, value in (read_json(path) if path.is_file() else {}).items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and not all(
            each is None or (type(each) is int and abs(each) < _MOST_IDS) for each in ids
        ):
            raise InputError(f"{path}: {name} {value!r} is no token id; write its number")


def _check_depth(config: Path, files: ModelFiles) -> None:
    """Raises InputError for more layers than tensors: to build the model would take minutes."""
    said = read_json(config)
    for part in (said, *(part for part in said.values() if isinstance(part, dict))):
        for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
            depth = part.get(name)
            if isinstance(depth, int | float) and depth > len(files.tensors):
                raise InputError(
                    f"{config}: says {depth} layers, but the files hold {len(files.tensors)} tensors;"
                    " give the one that was saved with them"
                )


def load_model(checked: CheckedModel, dtype: Dtype, device: str) -> PreTrainedModel:
    """Loads the weights in `dtype`, in eval mode.

    Raises InputError for weights that do not fit, and for NaN or infinity among them.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checked.files.directory,
            config=checked.config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=checked.trust_remote_code,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"{checked.name}: does not load ({_first_line(error)}); save it again with save_pretrained"
        ) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{checked.name}: {len(missing)} tensors are not in its files, first {missing[0]};"
            " they would be random; save the whole model with save_pretrained"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            held = checked.files.tensors[checked.stored_names[name][0]]
            if held.added is not None:
                parameter.copy_(read_tensor(held))
            check_finite(parameter, held)
    keep_rows_apart(model)
    return model.to(device).eval()


def _stored_names(skeleton: PreTrainedModel, files: ModelFiles) -> dict[str, tuple[str, ...]]:
    """Raises InputError where the files hold no tensor for a parameter under any of its names.

    A tied parameter has several; a checkpoint of the bare decoder lacks the prefix of the LM.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    prefix = f"{skeleton.base_model_prefix}."
    renamed = _renamed(skeleton, files)
    stored, missing = {}, []
    for names in aliases.values():
        candidates = [*names, *(name.removeprefix(prefix) for name in names)]
        found = [renamed.get(name, name) for name in candidates]
        held = tuple(dict.fromkeys(name for name in found if name in files.tensors))
        stored.update(dict.fromkeys(names, held))
        if not held:
            missing.append(names[0])
    if missing:
        mend = "save the whole model with save_pretrained"
        if not _holds_its_tensors(skeleton):
            mend = f"transformers makes them of others, which cannot be changed here; {SUPPORTED}"
        raise InputError(
            f"{files.directory}: {len(missing)} tensors are not in its files, first {missing[0]}; {mend}"
        )
    return stored


def _holds_its_tensors(skeleton: PreTrainedModel) -> bool:
    """Whether a family's files hold its tensors as they are: none is cut or joined as it is loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = get_model_conversion_mapping(skeleton)
    return all(isinstance(rule, WeightRenaming) for rule in rules)


def _hold_different(stored_names: Mapping[str, tuple[str, ...]], files: ModelFiles) -> bool:
    """Whether the files hold other values under two names of one tied parameter."""
    for names in {held for held in stored_names.values() if len(held) > 1}:
        first, *others = (read_tensor(files.tensors[name]) for name in names)
        if not all(torch.equal(first, other) for other in others):
            return True
    return False


def _check_shapes(
    skeleton: PreTrainedModel,
    layout: DecoderLayout,
    files: ModelFiles,
    stored_names: Mapping[str, tuple[str, ...]],
) -> None:
    """Raises InputError where the files hold other shapes, or more layers, than the configuration says.

    transformers would load the first layers without a word.
    """
    config = files.directory / "config.json"
    leaf = re.escape(layout.layers.rpartition(".")[2])
    ignored = skeleton._keys_to_ignore_on_load_unexpected or ()
    for name in files.tensors:
        place = re.search(rf"(?:^|\.){leaf}\.(\d+)\.", name)
        if place is None or any(re.search(pattern, name) for pattern in ignored):
            continue
        if int(place[1]) >= layout.count:
            raise InputError(
                f"{config}: says {layout.count} layers, but the files hold {name} as well; give the"
                " one that was saved with them"
            )
    for held in {stored for names in stored_names.values() for stored in names}:
        if not files.tensors[held].dtype.is_floating_point:
            raise InputError(
                f"{files.tensors[held].path}: tensor {held} has the dtype"
                f" {str(files.tensors[held].dtype).removeprefix('torch.')}, as quantised weights have;"
                " give a checkpoint in float32, bfloat16 or float16"
            )
    if not _holds_its_tensors(skeleton):
        return
    for name, parameter in skeleton.named_parameters():
        for stored in stored_names[name]:
            if files.tensors[stored].shape != tuple(parameter.shape):
                raise InputError(
                    f"{config}: wants {name} of the shape {tuple(parameter.shape)}, the files hold"
                    f" {files.tensors[stored].shape}; give the one that was saved with them"
                )


def _renamed(skeleton: PreTrainedModel, files: ModelFiles) -> dict[str, str]:
    """Names that transformers gives a file's tensors as it loads them -> their names in the file.

    GPT-NeoX's files say embed_out for what the model calls lm_head.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(skeleton) if isinstance(rule, WeightRenaming)]
    renamed = {rename_source_key(name, rules, [])[0]: name for name in files.tensors}
    return {new: name for new, name in renamed.items() if new != name}


def resolve_dtype(checked: CheckedModel, dtype: AnyDtype) -> Dtype:
    """`auto` is the dtype that most of the checkpoint's numbers are saved in, for float16 float32.

    Every number of float16 is one of float32; in bfloat16 three of its bits are lost, and in float16
    gradients overflow. Raises InputError for files in another dtype.
    """
    if dtype != "auto":
        return dtype
    sizes: dict[str, int] = {}
    for tensor in checked.files.tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype.is_floating_point:
            sizes[name] = sizes.get(name, 0) + tensor.bytes
    most = max(sizes, key=lambda name: sizes[name], default="none")
    if most in ("float32", "float16"):
        return "float32"
    if most == "bfloat16":
        return "bfloat16"
    raise InputError(f"{checked.name}: is saved in {most}; give --dtype float32")


def said_of_dtype(checked: CheckedModel, given: AnyDtype, device: str) -> list[str]:
    """What the user is told of the dtype that the model runs in."""
    dtype, kind = resolve_dtype(checked, given), torch.device(device).type
    kinds = {tensor.dtype for tensor in checked.files.tensors.values()}
    said = []
    if given == "auto" and dtype == "float32" and torch.float16 in kinds:
        said = ["float16 files run in float32, which holds their numbers exactly (--dtype auto)"]
    if dtype == "bfloat16" and kind in ("cpu", "cuda") and quick_dtype(kind) != dtype:
        said = [
            "warning: this device has no instructions for bfloat16 and is slow in it; --dtype float32 is"
            " faster and takes twice the memory"
        ]
    return said


def _base_of(adapter: Path, config: LoraConfig) -> Path:
    """The directory of an adapter's base; a relative one may be beside the adapter."""
    named = str(config.base_model_name_or_path)
    try:
        found = _directory(named, config.revision)
        found = found if found.is_dir() else adapter / named
        if not found.is_dir():
            raise InputError(f"{named}: no such model directory; write where the base is")
    except InputError as error:
        raise InputError(f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path: {error}") from None
    return found


def _directory(name: str, revision: str | None = None) -> Path:
    """A local directory as it is; a hub id as its downloaded or cached snapshot."""
    path = Path(name)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "~", "/")):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise InputError(
            f"{name}: no such model directory, and not to be had from the hub"
            f" ({type(error).__name__}); check the path, the network and the login"
        ) from None


def _why(error: BaseException) -> str:
    """What a library says of a directory; of code that it brings along, how to have it run."""
    if "trust_remote_code" in str(error):
        return "needs code of its own; read its *.py files, then give --trust-remote-code to run them"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
