"""A model whose parts are in memory only while they are needed.

The skeleton has its parameters on the meta device; a part is read from the checkpoint's files when
asked for and dropped again. Buffers (rotary frequencies) are computed at construction and stay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from expunge.errors import InputError
from expunge.models.rope import keep_rows_apart
from expunge.models.tensors import StoredTensor, check_finite, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from expunge.models.loading import CheckedModel


class Parts(Protocol):
    """A model and the means to have some of its modules in memory."""

    model: PreTrainedModel
    device: torch.device
    streamed: bool
    """Whether parts are read when needed; if not, the whole model is in memory all the time."""

    def load(self, *modules: str) -> None:
        """Brings the modules of these dotted names into memory; those that are there stay."""

    def release(self, *modules: str) -> None:
        """Drops them, unless the model is in memory as a whole."""


class WholeModel:
    """All parts in memory, always."""

    streamed = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def load(self, *modules: str) -> None:
        """Nothing to do."""

    def release(self, *modules: str) -> None:
        """Nothing to do."""


class StreamedModel:
    """Parts read from the files of a checked model, in `dtype`, on `device`."""

    streamed = True

    def __init__(self, checked: CheckedModel, dtype: torch.dtype, device: str) -> None:
        """Raises InputError where the files hold a tensor in another shape."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                checked.config, dtype=dtype, trust_remote_code=checked.trust_remote_code
            )
        keep_rows_apart(model)
        self.model = model.eval().requires_grad_(False)
        self.device = torch.device(device)
        self._dtype = dtype
        self._names = checked.stored_names
        self._finite: set[StoredTensor] = set()
        self._stored = checked.files.tensors
        for name, parameter in model.named_parameters():
            stored = self._stored[self._names[name][0]]
            if stored.shape != tuple(parameter.shape):
                raise InputError(
                    f"{stored.path}: tensor {name} has the shape {stored.shape}, the configuration"
                    f" says {tuple(parameter.shape)}; give the one that was saved with them"
                )
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def load(self, *modules: str) -> None:
        """Reads the modules' parameters from the files. Raises InputError for NaN or infinity."""
        for prefix in modules:
            for name, parameter in _parameters_of(self.model, prefix):
                if parameter.is_meta:
                    value = self._read(self._stored[self._names[name][0]])
                    _set(self.model, name, nn.Parameter(value, requires_grad=False))

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        """A parameter's value. Raises InputError where it is not finite."""
        value = read_tensor(stored).to(self.device, self._dtype)
        if stored not in self._finite:
            check_finite(value, stored)
            self._finite.add(stored)
        return value

    def release(self, *modules: str) -> None:
        """Puts the modules' parameters back on the meta device."""
        for prefix in modules:
            for name, parameter in _parameters_of(self.model, prefix):
                empty = torch.empty_like(parameter, device="meta")
                _set(self.model, name, nn.Parameter(empty, requires_grad=False))
        give_back_freed_memory()


@contextmanager
def loaded_in_turn(parts: Parts, modules: Sequence[str]) -> Iterator[None]:
    """Each of the modules is read as a forward pass reaches it and dropped as it leaves it."""
    with ExitStack() as stack:
        # A pass that fails or stops inside a module does not leave it.
        stack.callback(parts.release, *modules)
        for name in modules:
            module = parts.model.get_submodule(name)

            def enter(_module: nn.Module, _inputs: object, name: str = name) -> None:
                parts.load(name)

            def leave(_module: nn.Module, _inputs: object, _output: object, name: str = name) -> None:
                parts.release(name)

            for handle in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ):
                stack.callback(handle.remove)
        yield


def _parameters_of(model: nn.Module, prefix: str) -> list[tuple[str, nn.Parameter]]:
    module = model.get_submodule(prefix)
    # A tied parameter is listed under each of its names, so that either can be read alone.
    listed = module.named_parameters(prefix=prefix, remove_duplicate=False)
    return list(listed)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter


def give_back_freed_memory() -> None:
    """Asks the C library to return what was freed to the system; layers come and go in its heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def outside_layers(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names of the smallest modules with parameters of their own that are in none of the layers."""
    inside = tuple(f"{layer}." for layer in layers)
    return [
        name
        for name, module in model.named_modules()
        if name and not f"{name}.".startswith(inside) and module._parameters
    ]


def why_not_streamed(skeleton: nn.Module, *, own_code: bool) -> str | None:
    """Why a model's parts cannot be read one by one as from_pretrained would; None where they can."""
    if own_code:
        return "its own code may do more than reading its weights"
    stored = dict(skeleton.state_dict())
    if any(name in stored for name, _ in skeleton.named_buffers()):
        return "its files hold buffers"
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        if getattr(skeleton, attribute, None):
            return "it keeps some modules in float32"
    return None
