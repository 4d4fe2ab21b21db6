"""Memory of a program that runs on tensors without content.

Under `Meter` the code that will run later runs now: every number is a fake tensor, which has a shape,
a dtype and a place in autograd's graph but no bytes; token ids and masks are real, because shapes
follow from them. The meter adds up the storages that are alive, by what they are for.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WORK = "activations and temporaries"
LOGITS = "logits and their copies"
COPIES = "copies in CPU memory"
KEPT = "freed, kept by the C library"
_A_NUMBER = 1e-5
"""What every number that the program asks for is: positive, finite, and small enough for a check."""
_COMPARISONS = ("allclose", "equal")
_HIDDEN = ("logsumexp", "multinomial")
"""Operations that make a tensor of their argument's size where no mode sees it."""
_PRODUCTS = {
    "mm": 1,
    "addmm": 1,
    "bmm": 1,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 6,
}
"""Matrix products that oneDNN compiles for every new shape, by operation."""
_INTEGERS = ("arange", "randperm", "randint")
_INDEXING = ("index.Tensor", "index_put", "_index_put_impl_", "_unsafe_index")


class Meter(TorchDispatchMode):
    """Counts bytes of live storages by kind while it is active, and keeps the sum's highest state."""

    def __init__(
        self, vocabulary: int, *, accelerator: bool, in_cpu_memory: Collection[str] = ()
    ) -> None:
        """`accelerator`: copies to the CPU, and these kinds, are in another memory than the rest."""
        super().__init__()
        self._in_cpu_memory = {COPIES, *in_cpu_memory}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.accelerator = accelerator
        self._vocabulary = vocabulary
        self._storages: dict[int, _Storage] = {}
        self._heap = Heap()
        self._live: dict[str, int] = {}
        self._totals = [0, 0]
        self._peaks: list[tuple[tuple[int, int], dict[str, int]]] = [((0, 0), {}), ((0, 0), {})]
        self._kind: str | None = None
        self.compiled: dict[tuple[Any, ...], int] = {}
        """bfloat16 products of every shape on a processor, by operation and shapes."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Numbers that are made or computed in the body are fake and counted."""
        with ExitStack() as stack:
            stack.enter_context(_modules_move_fakes())
            stack.enter_context(self)
            stack.enter_context(_Answers(self))
            yield

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What the body makes is of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def _fake_empty(self, like: torch.Tensor) -> torch.Tensor:
        with self._fake:
            return torch.empty(like.shape, dtype=like.dtype)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor."""
        return torch.empty(shape, dtype=dtype)

    def name(self, tensor: torch.Tensor, kind: str) -> None:
        """Says what a living tensor is for."""
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is not None and storage.kind != kind:
            self._add(storage.kind, -storage.size)
            storage.kind = kind
            self._add(kind, storage.size)

    def begin(self) -> None:
        """Starts a phase: its peak is at least what is alive now."""
        self._peaks = [(self._height(memory), self._parts(memory)) for memory in (0, 1)]

    def peak(self, memory: int = 0) -> Mapping[str, int]:
        """Bytes by kind at the highest moment since `begin`: of memory 0, or 1 for the CPU's."""
        return {kind: size for kind, size in self._peaks[memory][1].items() if size}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        name = str(func).removeprefix("aten.")
        if name.startswith("prim."):
            return func(*args, **kwargs)
        if fakes and name.startswith("_local_scalar_dense"):
            return _answer(fakes[0].dtype)
        if fakes and name.startswith(_COMPARISONS):
            return True
        if fakes and len(fakes) < len(tensors):
            if tensors[0] is args[0] and name.startswith("copy_") and args[0] is not fakes[0]:
                return args[0]  # an id or mask: what it would hold is not known
            if name.startswith(_INDEXING):
                args = _with_positions(args)
        if fakes and name.startswith(_HIDDEN):
            self._see(self._fake_empty(tensors[0]))
        products = _PRODUCTS.get(name.partition(".")[0])
        if products and not self.accelerator and tensors[0].dtype == torch.bfloat16:
            self.compiled[name, *(tuple(tensor.shape) for tensor in tensors[:2])] = products
        if fakes or _gives_numbers(func, tensors, args, kwargs):
            with self._fake:
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor)
        return result

    def trim(self) -> None:
        """What malloc_trim does: freed memory goes back to the system."""
        self._heap.trim()

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        kind = self._kind
        if kind is None:
            # Nothing but logits is as wide as the vocabulary.
            kind = LOGITS if tensor.ndim and tensor.shape[-1] == self._vocabulary else WORK
        size = storage.nbytes()
        self._storages[key] = _Storage(
            kind, size, self._heap.take(size), weakref.ref(storage, lambda _: self._forget(key))
        )
        self._add(kind, size)

    def _forget(self, key: int) -> None:
        gone = self._storages.pop(key)
        self._heap.give_back(gone.size, gone.in_heap)
        self._add(gone.kind, -gone.size)

    def _memory(self, kind: str) -> int:
        return int(self.accelerator and kind in self._in_cpu_memory)

    def _kept(self, memory: int) -> int:
        """Freed bytes that are not free for others; an accelerator's allocator is not followed."""
        return 0 if self.accelerator or memory else self._heap.kept

    def _add(self, kind: str, size: int) -> None:
        self._live[kind] = self._live.get(kind, 0) + size
        memory = self._memory(kind)
        self._totals[memory] += size
        if self._height(memory) > self._peaks[memory][0]:
            self._peaks[memory] = (self._height(memory), self._parts(memory))

    def _height(self, memory: int) -> tuple[int, int]:
        """Bytes that others cannot have; of two moments with as many, the one in fuller use."""
        return self._totals[memory] + self._kept(memory), self._totals[memory]

    def _parts(self, memory: int) -> dict[str, int]:
        parts = {kind: size for kind, size in self._live.items() if self._memory(kind) == memory}
        return {**parts, KEPT: self._kept(memory)}


@dataclass
class _Storage:
    kind: str
    size: int
    in_heap: bool
    reference: weakref.ref[Any]


class Heap:
    """What the C library does with freed memory (glibc: man mallopt, M_MMAP_THRESHOLD).

    Pieces below a threshold are cut from one heap, which shrinks only where nothing lies at its end;
    larger ones come from the system and return to it. The threshold starts at 128 KiB and rises to
    the largest piece that was returned, up to 32 MiB.
    """

    _HIGHEST = 32 * 2**20
    HOLES = 0.2
    """Batches of other lengths do not fill the holes that the last ones left: share of the heap, as
    measured with mallinfo2 on runs of several methods (0 to 0.35)."""

    def __init__(self) -> None:
        self.live = self.high = 0
        self._threshold = 128 * 2**10

    @property
    def kept(self) -> int:
        """Bytes of the heap that hold nothing."""
        return round((1 + self.HOLES) * self.high) - self.live

    def trim(self) -> None:
        self.high = self.live

    def take(self, size: int) -> bool:
        in_heap = size < self._threshold
        if in_heap:
            self.live += size
            self.high = max(self.high, self.live)
        return in_heap

    def give_back(self, size: int, in_heap: bool) -> None:
        if in_heap:
            self.live -= size
        elif size <= self._HIGHEST:
            self._threshold = max(self._threshold, size)


class _Answers(TorchFunctionMode):
    """Calls that would leave PyTorch with numbers get made-up ones."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], FakeTensor):
            if func is torch.Tensor.tolist:
                return _list(args[0].shape, _answer(args[0].dtype))
            # A device object is where the program runs; the word is the CPU in any case.
            if func is torch.Tensor.cpu or (func is torch.Tensor.to and args[1:2] == ("cpu",)):
                with self._meter.making(COPIES):
                    dtype = next((x for x in args[2:] if isinstance(x, torch.dtype)), None)
                    copy = kwargs.get("copy", self._meter.accelerator)
                    return args[0].to(dtype or args[0].dtype, copy=copy)
        return func(*args, **kwargs)


@contextmanager
def _modules_move_fakes() -> Iterator[None]:
    """`Module.to` exchanges fake parameters with weak references to them, which PyTorch refuses."""
    own = nn.Module._apply

    def apply(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
        if not any(isinstance(p, FakeTensor) for p in module.parameters()):
            return own(module, convert, recurse)
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    with torch.no_grad():
                        moved = convert(parameter)
                    part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]


def _answer(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return _A_NUMBER if dtype.is_floating_point else 1


def _list(shape: tuple[int, ...], value: Any) -> Any:
    return value if not shape else [_list(shape[1:], value) for _ in range(shape[0])]


def _with_positions(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Boolean indices as the positions that they mark, which the shape of the result follows from."""

    def positions(index: Any) -> list[Any]:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            return [index]
        return list(index.nonzero(as_tuple=True))

    indices = list(itertools.chain.from_iterable(positions(index) for index in args[1]))
    return (args[0], indices, *args[2:])


def _gives_numbers(func: Any, tensors: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation on real tensors alone, or on none, gives floating-point numbers."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return bool(dtype.is_floating_point)
    if not tensors:
        return str(func).removeprefix("aten.").partition(".")[0] not in _INTEGERS
    return any(tensor.is_floating_point() for tensor in tensors)
