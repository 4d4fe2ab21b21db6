"""Reads a model as one run needs it: whole, sharded, or layer by layer for the segment engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from expunge.errors import InputError
from expunge.models.decoder import skeleton_of
from expunge.models.kernels import autocast_of
from expunge.models.loading import CheckedModel, Dtype, load_model
from expunge.models.parts import Parts, StreamedModel, WholeModel, why_not_streamed
from expunge.models.sharding import shard
from expunge.processes import OneProcess, Processes
from expunge.segments.engine import SegmentEngine
from expunge.segments.packing import NotASegment
from expunge.training.form import resolved_form
from expunge.training.layer_choice import resolved_layer
from expunge.training.preparation import Prepared
from expunge.training.progress import Progress
from expunge.training.unlearning import open_engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Opened:
    """A model that is read, ready for one run."""

    prepared: Prepared
    """The run, with its layer chosen."""
    parts: Parts
    engine: SegmentEngine | None
    why_whole: str | None
    """Why a method that could run its layers alone does not."""
    seconds: float
    """That reading the model took; a pass over rows that chooses a layer is not among them."""


def open_run(
    checked: CheckedModel,
    dtype: Dtype,
    prepared: Prepared,
    device: str,
    progress: Progress,
    *,
    processes: Processes | None = None,
    layer_record: Path | None = None,
) -> Opened:
    """Reads the model as the method needs it, chooses the layer where that is left open."""
    processes = processes or OneProcess()
    started = time.monotonic()
    parts = open_parts(checked, dtype, prepared, device, processes)
    choosing = time.monotonic()
    autocast = autocast_of(parts.device, parts.model.dtype)
    prepared = resolved_form(
        prepared, checked.layout, parts, checked.tokenizer, autocast, progress, processes
    )
    prepared = resolved_layer(
        prepared,
        checked.layout,
        parts,
        autocast,
        progress,
        processes=processes,
        record=layer_record,
    )
    chosen = time.monotonic()
    parts, engine, why_whole = _cut(checked, dtype, prepared, device, parts, processes)
    seconds = choosing - started + time.monotonic() - chosen
    return Opened(prepared, parts, engine, why_whole, seconds)


def open_parts(
    checked: CheckedModel,
    dtype: Dtype,
    prepared: Prepared,
    device: str,
    processes: Processes,
) -> Parts:
    """The model as a whole, or in parts where the method and the model allow it."""
    if prepared.method.trained_layers(checked.layout) is None:
        weights = prepared.method.sharded_weights(checked.layout)
        return WholeModel(whole_model(checked, dtype, device, processes, weights))
    skeleton = skeleton_of(checked.config, trust_remote_code=checked.trust_remote_code)
    if why_not_streamed(skeleton, own_code=checked.trust_remote_code) is None:
        return StreamedModel(checked, getattr(torch, dtype), device)
    return WholeModel(load_model(checked, dtype, device))


def whole_model(
    checked: CheckedModel,
    dtype: Dtype,
    device: str,
    processes: Processes,
    trained: Sequence[str] = (),
) -> PreTrainedModel:
    """The whole model; where the processes share weights, `trained` ones are spread in float32 too."""
    if not processes.shards:
        return load_model(checked, dtype, device)
    model = load_model(checked, dtype, "cpu")
    shard(model, checked.layout, trained)
    return model


def _cut(
    checked: CheckedModel,
    dtype: Dtype,
    prepared: Prepared,
    device: str,
    parts: Parts,
    processes: Processes,
) -> tuple[Parts, SegmentEngine | None, str | None]:
    """The engine for the method's layers where they can be run alone, or the whole model and why."""
    if prepared.method.trained_layers(checked.layout) is None:
        return parts, None, None
    try:
        return parts, open_engine(prepared, checked.layout, parts, processes), None
    except NotASegment as reason:
        if processes.shards:
            raise InputError(
                f"--method {prepared.method.name}: this model cannot be run in parts ({reason}), and"
                " then its trained weights cannot be sharded; use a configuration without FSDP"
            ) from None
        if parts.streamed:
            parts = WholeModel(load_model(checked, dtype, device))
        return parts, None, str(reason)
