"""One run from files to files: checks, loads, unlearns, writes the run directory."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import expunge
from expunge.data.fingerprints import data_fingerprint, named
from expunge.data.formats import sha256_of
from expunge.data.rows import Reading, RowSet
from expunge.disk import check_not_read, write_whole
from expunge.errors import InputError
from expunge.methods.base import Method
from expunge.models.devices import resolve_device
from expunge.models.files import MANIFEST
from expunge.models.loading import (
    CheckedModel,
    RunDtype,
    check_base,
    check_model,
    resolve_dtype,
    said_of_dtype,
)
from expunge.models.parts import give_back_freed_memory
from expunge.models.tensors import write_tensors
from expunge.models.text_forms import text_policies
from expunge.models.writing import (
    check_disk_space,
    close_as,
    copy_target,
    rounding_warnings,
    verify_checkpoint,
    write_checkpoint,
)
from expunge.processes import Processes, processes_of, refused_together
from expunge.runs.keeping import Keeper, plain_errors
from expunge.runs.manifest import describe_run, digests, finite, settings_of
from expunge.runs.opening import open_run, whole_model
from expunge.runs.scratch import Scratch, check_output, shared_scratch
from expunge.training.options import TrainingOptions
from expunge.training.preparation import Prepared, prepare
from expunge.training.progress import Progress, Silent
from expunge.training.reference import with_base
from expunge.training.stopping import stop_requests
from expunge.training.unlearning import Outcome, Place, plan_cache, unlearn_prepared

METRICS = "metrics.jsonl"
DIRECTIONS = "expunge-directions.safetensors"
ADAPTER = "adapter"
_CALIBRATION = tyro.conf.arg(name="calibration", aliases=("--nonmembers",))


@dataclass(frozen=True)
class Sources(Reading):
    """Where a run or a sweep of runs reads and writes, and on what."""

    model: str
    """The target model: a directory, or a hub id."""
    forget: str
    """Rows to remove: file, directory or hub id. A directory holds forget.*."""
    output: str
    """The run directory to write. It is a model directory with the record of the run."""
    retain: str | None = None
    """Rows to keep: file, directory or hub id. A directory holds retain.*."""
    nonmembers: Annotated[str | None, _CALIBRATION] = None
    """Non-members: text that the model never saw. It is of the forget set's kind. Forget rows are moved
    to its losses, and the checkpoint is chosen by it."""
    dtype: RunDtype = "auto"
    """Dtype of frozen weights and products. Trained tensors are float32 always. auto: the one of the
    model's files, for float16 files float32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    overwrite: bool = False
    """Replace an existing output. Without --resume also discard an unfinished run."""
    trust_remote_code: bool = False
    """Run code that the model's directory brings along."""


@dataclass(frozen=True)
class RunInputs(Sources):
    """What one run is given beside its method and its training options."""

    base: str | None = None
    """The model from before the fine-tune. `--method retrain` trains it on the rows to keep. Other
    methods raise the losses of forget rows to its losses, if --calibration is not given. What the
    fine-tune added to the loss of other text of their kind is added to these."""
    keep_adapter: bool = False
    """Also write the LoRA adapter, beside the merged model, to OUT/adapter."""
    resume: bool = False
    """Go on with an unfinished run. Its settings must be the same; without one a run begins."""


def run(
    inputs: RunInputs,
    method: Method,
    options: TrainingOptions,
    progress: Progress | None = None,
    preset: str | None = None,
    given: Mapping[str, RowSet] | None = None,
) -> dict[str, Any]:
    """Carries out one run, or goes on with an unfinished one, and returns its manifest.

    `given` rows, by the
    names forget, retain and nonmembers, stand for those that `inputs` names; the manifest then holds its
    words for them.

    Raises InputError before a model is loaded and anything is written, Interrupted where it was asked
    to stop and can be continued, RunError otherwise. The output appears by rename once the reloaded
    checkpoint has been compared.
    """
    started = time.monotonic()
    progress = progress or Silent()
    device = resolve_device(inputs.device)
    processes = processes_of(device)
    output = Path(inputs.output)
    complete = _completed(output, inputs, processes)
    if complete is not None:
        progress.message(f"{output}: is complete already; nothing to resume")
        return complete
    with refused_together(processes):
        checked, sets, prepared = check_run(inputs, method, options, given=given)
        if (
            processes.shards
            and not method.has_adapter
            and not method.trained_layers(checked.layout)
            and not method.sharded_weights(checked.layout)
        ):
            raise InputError(
                f"--method {method.name}: the full weights that it trains cannot be sharded; choose"
                " --method spectral, or libu, which trains an adapter, or a configuration without FSDP"
            )
        if processes.count > 1 and method.whole_steps:
            raise InputError(
                f"--method {method.name}: all forget rows of a step move the weights together, so one"
                " process must hold them; start it without accelerate launch, or choose --method npo"
            )
    hashing = time.monotonic()
    model_sha256 = checked.files.sha256()
    hash_seconds = time.monotonic() - hashing
    base: dict[str, Any] | None = None
    weights: dict[str, str] = {}
    if prepared.base is not None:
        weights = {path.name: sha256_of(path) for path in prepared.base.files.weights}
        base = {"model": named(prepared.base.name), "sha256": weights}
    target, checked = checked, prepared.changed(checked)
    with refused_together(processes):
        _check_influence(options, prepared, model_sha256)
        if prepared.yardstick == "base" and weights.items() <= model_sha256.items():
            raise InputError(
                f"--base {inputs.base}: is {inputs.model} itself, which knows the forget rows; give the"
                " model from before the fine-tune"
            )
    asked = _asked(inputs, method, prepared, sets, model_sha256) | {"base": base}
    with (
        shared_scratch(
            processes, output, asked, resume=inputs.resume, overwrite=inputs.overwrite
        ) as scratch,
        stop_requests() as stop,
        plain_errors(scratch, stop),
    ):
        if processes.is_main and not scratch.is_marked("copied"):
            progress.phase("copying the model", 0, 1)
            copy_target(checked, scratch.output)
            scratch.mark("copied")
            progress.phase("copying the model", 1, 1)
        for line in said_of_dtype(checked, inputs.dtype, device):
            progress.message(line)
        if prepared.yardstick == "base" and prepared.base is not None:
            asked_first = whole_model(
                prepared.base, resolve_dtype(prepared.base, inputs.dtype), device, processes
            )
            prepared = with_base(prepared, asked_first, checked.layout, progress, processes)
            del asked_first  # before the target is loaded in its place
            give_back_freed_memory()
        opened = open_run(
            checked,
            resolve_dtype(checked, inputs.dtype),
            prepared,
            device,
            progress,
            processes=processes,
            layer_record=scratch.layer,
        )
        prepared, parts, engine = opened.prepared, opened.parts, opened.engine
        why_whole, opening = opened.why_whole, opened.seconds
        del opened  # the parts are let go before the result is loaded beside them
        # Writing reads the model as often: once for hashes, twice to compare, once to run it.
        reserve = 1.25 * (3 * hash_seconds + opening)
        saved = scratch.saved()
        processes.wait()  # the main one saves soon, and the others must not take that for old
        keeper = Keeper(scratch, stop, prepared.options.save_every, writes=processes.is_main)
        place = Place(
            started,
            cache_directory=scratch.cache,
            cache_filled=scratch.is_marked("cache"),
            cache_done=keeper.mark_cache,
            reserve=reserve,
            keep_adapter=inputs.keep_adapter,
            keeper=keeper,
            saved=saved,
            tracker_directory=scratch.output / "trackers",
            processes=processes,
        )
        with keeper.metrics(scratch.output / METRICS, saved):
            outcome = unlearn_prepared(
                prepared, checked.layout, parts, engine, why_whole, place, progress, keeper.log
            )
        if not processes.is_main:
            return {"status": "written by the main process"}
        writing = time.monotonic()
        streamed = parts.streamed
        del parts, engine, place  # before the result is loaded beside it
        give_back_freed_memory()
        progress.phase("writing", 0, 1)
        changes = write_checkpoint(checked, outcome.finished.weights, scratch.output)
        verify_checkpoint(checked, outcome.finished.weights, scratch.output, streamed=streamed)
        _write_artifacts(outcome, checked, scratch.output)
        progress.phase("writing", 1, 1)
        manifest = describe_run(asdict(inputs), method, preset, sets, outcome, device)
        manifest["model_sha256"] = model_sha256
        merged = checked.files.directory.name if checked.files.adapter else None
        manifest["merged_adapter"] = merged and {"base": merged}
        manifest["base"] = base
        manifest["processes"] = processes.count
        manifest["resumed_from_steps"] = keeper.resumed_from
        manifest["changed_tensors"] = [asdict(change) for change in changes]
        for warning in rounding_warnings(changes):
            manifest["warnings"].append(warning)
            progress.message(f"warning: {warning}")
        manifest["seconds"]["write"] = time.monotonic() - writing
        manifest["seconds"]["total"] = time.monotonic() - started
        manifest["output_sha256"] = digests(scratch.output)
        text = json.dumps(finite(manifest), indent=2, allow_nan=False)
        write_whole(scratch.output / MANIFEST, text + "\n")
        for read in {checked.name: checked, target.name: target}.values():
            close_as(read.files, scratch.output)
        scratch.publish()
    return manifest


def check_run(
    inputs: RunInputs,
    method: Method,
    options: TrainingOptions,
    *,
    writes: bool = True,
    given: Mapping[str, RowSet] | None = None,
) -> tuple[CheckedModel, dict[str, RowSet], Prepared]:
    """Everything that can be checked before weights are read and anything is written.

    Without `writes` the output is not looked at; `given` as for `run`. Raises InputError.
    """
    names = ("forget", "retain", "nonmembers")
    if writes:
        output = Path(inputs.output)
        check_output(output, overwrite=inputs.overwrite)
        read = {name: getattr(inputs, name) for name in ("model", "base", *names)}
        for place in (output, Scratch(output).root):
            check_not_read("--output", place, {**read, "influence": options.influence})
    if inputs.keep_adapter and not method.has_adapter:
        raise InputError(f"--keep-adapter: {method.name} trains no adapter here; leave the option out")
    checked = check_model(inputs.model, trust_remote_code=inputs.trust_remote_code)
    if inputs.keep_adapter and checked.files.adapter:
        raise InputError(
            f"--keep-adapter: {inputs.model} is an adapter itself, so that no directory holds the base"
            " of another; merge it first, or leave the option out"
        )
    base = None if inputs.base is None else check_base(inputs.base, checked)
    sets = inputs.read_sets(*names) if given is None else dict(given)
    if writes:
        for rows in sets.values():
            data_fingerprint(rows)  # which the manifest will hold, and a secret may be missing
    prepared = prepare(
        method,
        options,
        checked.config,
        checked.layout,
        checked.tokenizer,
        sets.get("forget", RowSet((), "", {})),
        sets.get("retain"),
        sets.get("nonmembers"),
        text_policies(checked, options.chat_template, options.long_rows),
        has_base=base is not None,
    )
    prepared = replace(prepared, base=base)
    if writes:
        beside = _bytes_of_cache(prepared, checked, inputs)
        check_disk_space(prepared.changed(checked).files, Path(inputs.output), beside)
    return checked, sets, prepared


def _check_influence(
    options: TrainingOptions, prepared: Prepared, model_sha256: Mapping[str, str]
) -> None:
    """Raises InputError where the influence.json is about another model."""
    used = prepared.influence
    if used is not None and dict(used.model_sha256) != dict(model_sha256):
        raise InputError(
            f"--influence {options.influence}: is about another model than the one given (their"
            " SHA-256 differ); run expunge analyze influence on this one"
        )


def _completed(output: Path, inputs: RunInputs, processes: Processes) -> dict[str, Any] | None:
    """The manifest of a run that was complete when it was resumed."""
    if not inputs.resume:
        return None
    scratch = Scratch(output)
    with refused_together(processes):
        if processes.is_main and os.path.lexists(scratch.root):
            scratch.prove()
            scratch.put_back()
    unfinished = scratch.root.exists() and not scratch.is_published
    anew = not scratch.root.exists() and inputs.overwrite
    if unfinished or anew or not (output / MANIFEST).is_file():
        return None
    processes.wait()
    if processes.is_main:
        shutil.rmtree(scratch.root, ignore_errors=True)
    manifest: dict[str, Any] = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _asked(
    inputs: RunInputs,
    method: Method,
    prepared: Prepared,
    sets: Mapping[str, RowSet],
    model_sha256: Mapping[str, str],
) -> dict[str, Any]:
    """What a continued run must have in common with its beginning."""
    free = {"output", "overwrite", "resume"}
    training = {key: value for key, value in asdict(prepared.used).items() if key != "time_limit"}
    return {
        "expunge": expunge.__version__,
        "inputs": {key: value for key, value in asdict(inputs).items() if key not in free},
        "method": settings_of(method),
        "training": training,
        "influence_sha256": None if prepared.influence is None else prepared.influence.sha256,
        "data_sha256": {name: dict(rows.sha256) for name, rows in sets.items()},
        "model_sha256": dict(model_sha256),
    }


def _bytes_of_cache(prepared: Prepared, checked: CheckedModel, inputs: RunInputs) -> int:
    if prepared.method.trained_layers(checked.layout) is None:
        return 0
    return plan_cache(
        prepared, checked.layout.width, getattr(torch, resolve_dtype(checked, inputs.dtype))
    ).bytes


def _write_artifacts(outcome: Outcome, checked: CheckedModel, scratch: Path) -> None:
    if outcome.artifacts:
        write_tensors(scratch / DIRECTIONS, outcome.artifacts, {})
    finished = outcome.finished
    if finished.adapter is not None and finished.adapter_config is not None:
        adapter = scratch / ADAPTER
        adapter.mkdir(exist_ok=True)
        write_tensors(adapter / "adapter_model.safetensors", dict(finished.adapter), {"format": "pt"})
        config = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in finished.adapter_config.items()
        }
        config["base_model_name_or_path"] = named(checked.name)
        text = json.dumps(config, indent=2, default=str)
        write_whole(adapter / "adapter_config.json", text + "\n")
