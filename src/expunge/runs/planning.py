"""What a run will take, said before it: memory by part and phase, disk, steps, and whether it fits.

Memory is a formula of shapes (memory.py); here are the budget it must fit and what would take less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from expunge.data.tokenization import Example
from expunge.errors import InputError
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.base import Method
from expunge.methods.libu import LIBU
from expunge.methods.retrain import Retrain
from expunge.models.decoder import skeleton_of
from expunge.models.loading import CheckedModel
from expunge.models.parts import give_back_freed_memory, why_not_streamed
from expunge.runs.memory import Formula
from expunge.runs.memory_parts import Phase
from expunge.segments.packing import NotASegment
from expunge.segments.segment import Segment
from expunge.training.layer_choice import extreme_layers, is_open, with_layer
from expunge.training.options import TrainingOptions, resolved, size_in_bytes
from expunge.training.preparation import Prepared
from expunge.training.unlearning import plan_cache

GIB = 2**30
GPUS = {
    "h200-141": 139.8,
    "h100-80": 79.1,
    "a100-80": 79.1,
    "a100-40": 39.4,
    "l40s-48": 44.4,
    "rtx4090-24": 23.5,
    "t4-16": 14.6,
}
"""GiB that PyTorch can use of well-known GPUs."""
_LEANER: Mapping[str, Sequence[type[LIBU] | type[AdaptiveRMU]]] = {
    "spectral": (LIBU, AdaptiveRMU),
    "libu": (AdaptiveRMU,),
}
"""Methods to propose where one does not fit: what erases best first."""
_IMPORTED = 60 * 2**20
"""Bytes of the libraries that a run imports and a plan does not."""


@dataclass(frozen=True)
class Budget:
    """The memory that the model has to run in."""

    name: str
    bytes: int
    device_type: str
    """cpu, cuda or mps."""


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    model: str
    method: str
    dtype: str
    budget: Budget
    path: str
    """How hidden states or logits are computed: segment, hooks or whole model."""
    why_whole: str | None
    phases: Sequence[Phase]
    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    """Of one pass over each side's rows."""
    measured_rows: int
    """Rows that each candidate is measured on; 0 where none is."""
    epochs: float
    """Passes over the forget set; fewer than asked for where --max-steps ends the run."""
    steps: int
    steps_per_epoch: int
    step_tokens: float
    """Of the rows of a step, the mean."""
    batch_size: int
    cache_bytes: int
    cache_rows: int
    rows_recomputed: int
    output_bytes: int
    state_bytes: int
    time_limit: str | None
    shards: int
    """Processes that share the weights and the rows of a step; memory is that of one."""
    warnings: Sequence[str]

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def cpu_peak(self) -> int:
        """Most CPU memory, where the model runs in another."""
        return max(phase.cpu_bytes for phase in self.phases)

    @property
    def scratch_bytes(self) -> int:
        """Disk beside the output until the run ends: the cache, a state and the one replacing it."""
        return self.cache_bytes + 2 * self.state_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak.bytes <= self.budget.bytes

    def to_json(self) -> dict[str, Any]:
        """Every figure, in bytes where it is memory or disk."""
        return {
            **dataclasses.asdict(self),
            "computed": True,
            "phases": [
                {**vars(phase), "bytes": phase.bytes, "cpu_bytes": phase.cpu_bytes}
                for phase in self.phases
            ],
            "peak_phase": self.peak.name,
            "peak_bytes": self.peak.bytes,
            "cpu_peak_bytes": self.cpu_peak,
            "scratch_bytes": self.scratch_bytes,
            "fits": self.fits,
        }


def budget_of(on: str | None, device: str, resolved_device: str) -> Budget:
    """The GPU or size that `--on` names; without it this machine's memory of the run's device.

    `device` is as the user gave it, `resolved_device` what `auto` becomes here. Raises InputError.
    """
    if on is None:
        kind = torch.device(resolved_device).type
        if kind == "cuda":
            properties = torch.cuda.get_device_properties(torch.device(resolved_device))
            return Budget(f"this machine's {properties.name}", properties.total_memory, kind)
        return Budget("this machine's memory", machine_memory(), kind)
    if on.lower() in GPUS:
        if device == "cpu":
            raise InputError(f"--on {on}: is a GPU, but --device is cpu; leave one of them out")
        return Budget(on.lower(), int(GPUS[on.lower()] * GIB), "cuda")
    try:
        size = int(size_in_bytes(on))
        if size < 1:
            raise InputError("no size")
    except (InputError, OverflowError):
        known = ", ".join(GPUS)
        raise InputError(f"--on {on}: unknown; give a size such as 24GB, or one of {known}") from None
    return Budget(on, size, "cpu" if device == "cpu" else "cuda")


def machine_memory() -> int:
    """RAM of this machine, or what its control group may use of it, in bytes."""
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def plan(checked: CheckedModel, prepared: Prepared, dtype: str, budget: Budget, shards: int = 1) -> Plan:
    """What the run takes, of each of `shards` processes. No weights are read and nothing is written.

    Which layer `auto` chooses only the weights can say: both ends are planned for, and the one that
    takes more is given. So is the form with the chat template, where the weights decide on it.
    """
    if prepared.plain is not None:
        said = (
            "--chat-template auto: planned with the template, whose rows are longer; the run reads a"
            " sample of them both ways to choose"
        )
        prepared = dataclasses.replace(prepared, warnings=[*prepared.warnings, said])
    if is_open(prepared):
        ends = extreme_layers(checked.layout)
        plans = [
            _planned(checked, with_layer(prepared, end), dtype, budget, shards, chooses=True)
            for end in ends
        ]
        worst = max(range(len(ends)), key=lambda index: plans[index].peak.bytes)
        said = (
            f"--method.layer auto: planned for layer {ends[worst]}, as no layer of"
            f" {min(ends)} to {max(ends)} takes more; the run chooses one by the weights"
        )
        return dataclasses.replace(plans[worst], warnings=[*plans[worst].warnings, said])
    return _planned(checked, prepared, dtype, budget, shards)


def _planned(
    checked: CheckedModel,
    prepared: Prepared,
    dtype: str,
    budget: Budget,
    shards: int,
    *,
    chooses: bool = False,
) -> Plan:
    """The plan of a run whose layer is known; `chooses` says whether the run looks for it first."""
    torch_dtype = getattr(torch, dtype)
    layers = prepared.method.trained_layers(checked.layout)
    cache, streamed, why = None, False, None
    if layers is not None:
        skeleton = skeleton_of(checked.config, trust_remote_code=checked.trust_remote_code)
        try:
            Segment(skeleton, checked.layout, *layers)
            cache = plan_cache(prepared, checked.layout.width, torch_dtype)
            streamed = why_not_streamed(skeleton, own_code=checked.trust_remote_code) is None
        except NotASegment as reason:
            why = str(reason)
    formula = Formula(
        checked,
        prepared,
        torch_dtype,
        budget.device_type,
        cache,
        streamed=streamed,
        chooses=chooses,
        shards=shards,
    )
    used, measured = prepared.used, prepared.validation.sides
    return Plan(
        model=checked.name,
        method=prepared.method.name,
        dtype=dtype,
        budget=budget,
        path="whole model" if layers is None else "hooks" if cache is None else "segment",
        why_whole=why,
        phases=formula.phases(_process_bytes()),
        rows={"forget": _rows(prepared.forget), "retain": _rows(prepared.retain)},
        tokens={"forget": _tokens(prepared.forget), "retain": _tokens(prepared.retain)},
        measured_rows=sum(map(len, measured)) if prepared.measures else 0,
        epochs=round(used.steps / used.steps_per_epoch, 4),
        steps=used.steps,
        steps_per_epoch=used.steps_per_epoch,
        step_tokens=round(formula.step_tokens, 1),
        batch_size=used.batch_size,
        cache_bytes=0 if cache is None else cache.bytes,
        cache_rows=0 if cache is None else len(cache.slots),
        rows_recomputed=0 if cache is None else cache.missing,
        output_bytes=checked.files.bytes,
        state_bytes=formula.state_bytes,
        time_limit=used.time_limit,
        shards=shards,
        warnings=prepared.warnings,
    )


def alternatives(
    checked: CheckedModel, prepared: Prepared, dtype: str, budget: Budget, shards: int = 1
) -> Iterator[tuple[str, Plan]]:
    """What would take less, one change at a time, all of them together, and at last by another method
    with its own defaults: options and plan."""
    together: list[str] = []
    all_prepared, all_dtype = prepared, dtype
    for option, changed, changed_dtype in _changes(prepared, dtype):
        other = _prepared(prepared, checked, changed)
        yield option, plan(checked, other, changed_dtype, budget, shards)
        together.append(option)
        all_prepared = _prepared(all_prepared, checked, changed)
        all_dtype = changed_dtype if changed_dtype != dtype else all_dtype
    if len(together) > 1:
        yield " ".join(together), plan(checked, all_prepared, all_dtype, budget, shards)
    for method in _LEANER.get(prepared.method.name, ()):
        other = _of_method(prepared, checked, method())
        yield f"--method {method.name}", plan(checked, other, dtype, budget, shards)


def _changes(prepared: Prepared, dtype: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Option, fields of the options or the method that it sets, and the dtype."""
    if dtype == "float32":
        yield "--dtype bfloat16", {}, "bfloat16"
    if prepared.used.select == "best":
        yield "--select last", {"select": "last"}, dtype
    cuts = prepared.used.batch_size > 1 and not prepared.method.whole_steps
    if cuts and prepared.options.micro_batch_size != 1:
        yield "--micro-batch-size 1", {"micro_batch_size": 1}, dtype
    if getattr(prepared.method, "gradient_checkpointing", None) is False:
        yield "--method.gradient-checkpointing", {"gradient_checkpointing": True}, dtype
    if getattr(prepared.method, "parameters", None) == "full":
        yield "--method.parameters lora", {"parameters": "lora"}, dtype
    if prepared.used.batch_size > 1:
        half = prepared.used.batch_size // 2
        yield f"--batch-size {half}", {"batch_size": half}, dtype


def retraining(
    checked: CheckedModel, prepared: Prepared, dtype: str, budget: Budget, shards: int = 1
) -> Plan | None:
    """What it would take to retrain the base instead, by the defaults; None without a base or rows to
    keep, or where that is the run."""
    method = Retrain()
    rows = [example for example in prepared.retain if example.listed]
    if prepared.base is None or prepared.retrains or not rows:
        return None
    options = TrainingOptions(seed=prepared.options.seed)
    used = resolved(method, options, checked.layout, len(rows))
    other = dataclasses.replace(
        prepared, method=method, options=options, used=used, forget=rows, retain=(), warnings=()
    )
    return plan(prepared.base, other, dtype, budget, shards)


def _of_method(prepared: Prepared, checked: CheckedModel, method: Method) -> Prepared:
    """The same rows by another method, which may hold no text but theirs."""
    return dataclasses.replace(
        prepared,
        method=method,
        used=resolved(method, prepared.options, checked.layout, len(prepared.forget)),
        retain=[e for e in prepared.retain if e.listed or method.random_rows],
        validation=dataclasses.replace(prepared.validation, tokens=method.matches_tokens),
    )


def _prepared(prepared: Prepared, checked: CheckedModel, changed: Mapping[str, Any]) -> Prepared:
    """The same rows with other options."""
    known = {field.name for field in dataclasses.fields(TrainingOptions)}
    options = dataclasses.replace(
        prepared.options, **{name: value for name, value in changed.items() if name in known}
    )
    method: Any = prepared.method
    method = dataclasses.replace(
        method, **{name: value for name, value in changed.items() if name not in known}
    )
    used = resolved(method, options, checked.layout, len(prepared.forget))
    return dataclasses.replace(prepared, method=method, options=options, used=used)


def _process_bytes() -> int:
    """This process's memory, which has read and tokenised the rows, and what a run imports beside."""
    give_back_freed_memory()
    return int(psutil.Process().memory_info().rss) + _IMPORTED


def _rows(examples: Sequence[Example]) -> int:
    return len({example.row_id for example in examples})


def _tokens(examples: Sequence[Example]) -> int:
    return sum(map(len, examples))
