"""The parts that a memory plan names, and its constants, which `benchmarks/plan.py` measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PROCESS = "the process itself"
CONTEXT = "CUDA context and kernels"
WEIGHTS = "weights"
TRAINED = "trained weights, float32"
OPTIMIZER = "optimiser state"
GRADIENTS = "gradients"
ACTIVATIONS = "activations and temporaries"
CASTS = "trained weights, cast for products"
LOGITS = "logits and their copies"
REFERENCE = "what is kept of the target"
PAGES = "cached states, pages in memory"
COPIES = "copies in CPU memory"
FILES = "model files, while they are read"
PRODUCTS = "products compiled for their shapes"
KEPT = "freed, kept by the C library"
ROUNDING = "rounding of the GPU's allocator"

OF_CPU = (COPIES, FILES, PAGES)
"""Parts that are in CPU memory wherever the model runs."""
KEPT_OF_LAYER = 1.1
"""K: what a layer keeps for the backward pass, in units of what its linear maps take and give (1.0 to
1.15 in four families)."""
KEPT_IN_BFLOAT16 = 1.35
"""The same in bfloat16 beside an adapter, which casts its input once a map, and where norms are trained,
which keep float32 (1.2 to 1.5)."""
FREED_BESIDE_ADAPTER = 0.65
"""On a processor: pieces that are freed between kept ones and not given back, as a share of the
activations. An adapter makes three tensors for each that a map keeps."""
ROUNDING_SHARE = 0.05
"""Share of a GPU's tensors that is rounding of its allocator; assumed."""
PRODUCT_BYTES, MOST_PRODUCTS = 583_000, 1024
"""Bytes that oneDNN keeps of each product of another shape, whatever its size, and of how many."""
STEP_NUMBERS = 4
"""Temporaries of an optimiser's step on one matrix, in float32 copies of it."""
CONTEXT_BYTES = 600 * 2**20
"""Assumed, for no figure here is measured on a GPU."""


@dataclass(frozen=True)
class Phase:
    """The highest moment of one phase, in bytes by part."""

    name: str
    parts: Mapping[str, int]
    """Of the memory that the model runs in."""
    cpu_parts: Mapping[str, int]
    """Of CPU memory, where that is another."""

    @property
    def bytes(self) -> int:
        """Everything in the memory that the model runs in."""
        return sum(self.parts.values())

    @property
    def cpu_bytes(self) -> int:
        """Everything in CPU memory, where that is another."""
        return sum(self.cpu_parts.values())
