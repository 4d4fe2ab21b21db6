"""One run from files to files: checks, loads, unlearns, writes the run directory."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil

import expunge
from expunge.data.rows import RowSet, read_rows
from expunge.data.tokenization import encode_rows
from expunge.errors import InputError
from expunge.methods.base import Method
from expunge.models.loading import (
    CheckedModel,
    check_model,
    load_model,
    resolve_device,
    text_policy,
)
from expunge.models.writing import (
    check_disk_space,
    describe,
    rounding_warnings,
    verify_checkpoint,
    write_checkpoint,
)
from expunge.training.progress import Progress, Silent
from expunge.training.unlearning import Outcome, TrainingOptions, check_rows, unlearn_model

MANIFEST = "expunge.json"
METRICS = "metrics.jsonl"
DIRECTIONS = "expunge-directions.safetensors"
ADAPTER = "adapter"
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True)
class RunInputs:
    """Where a run reads and writes, and on what."""

    model: str
    """The target model: a directory, or a hub id."""
    forget: str
    """Rows to remove: a file, a directory with forget.*, or a hub data set id."""
    output: str
    """The run directory to write: a model directory with the record of the run."""
    retain: str | None = None
    """Rows to keep: a file, a directory with retain.*, or a hub data set id."""
    nonmembers: str | None = None
    """Never-seen text; candidates are then also chosen by how far members can be told from it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights and of the products; trained tensors are float32 always."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    keep_adapter: bool = False
    """Also write the LoRA adapter, beside the merged model, to OUT/adapter."""
    overwrite: bool = False
    """Replace an existing output."""
    trust_remote_code: bool = False
    """Run code that the model's directory brings along."""


def run(
    inputs: RunInputs,
    method: Method,
    options: TrainingOptions,
    progress: Progress | None = None,
    preset: str | None = None,
) -> dict[str, Any]:
    """Carries out one run and returns its manifest.

    Raises InputError before a model is loaded and anything is written, RunError later. The output
    appears by rename once the reloaded checkpoint has been compared.
    """
    started = time.monotonic()
    progress = progress or Silent()
    device = resolve_device(inputs.device)
    output = Path(inputs.output)
    _check_output(output, inputs.overwrite)
    if inputs.keep_adapter and not method.has_adapter:
        raise InputError(
            f"--keep-adapter: {method.name} trains no adapter here; leave the option out"
        )
    checked = check_model(inputs.model, trust_remote_code=inputs.trust_remote_code)
    method.check(checked.layout)
    sets = _read_sets(inputs)
    check_rows(method, sets["forget"], sets.get("retain"), sets.get("nonmembers"))
    policy = text_policy(checked, chat_template=options.chat_template, long_rows=options.long_rows)
    for role, rows in sets.items():
        encode_rows(rows, checked.tokenizer, policy, eos=role == "retain")
    check_disk_space(checked.files, output)

    with _scratch_beside(output) as scratch:
        loading = time.monotonic()
        model = load_model(checked, inputs.dtype, device)
        # Writing reads, writes, hashes and reloads the model.
        reserve = 4 * (time.monotonic() - loading)
        with (scratch / METRICS).open("w", encoding="utf-8") as metrics:

            def log(entry: Mapping[str, Any]) -> None:
                metrics.write(json.dumps(_finite(entry), allow_nan=False) + "\n")
                metrics.flush()

            outcome = unlearn_model(
                model,
                checked.tokenizer,
                method,
                sets["forget"],
                sets.get("retain"),
                sets.get("nonmembers"),
                options,
                layout=checked.layout,
                keep_adapter=inputs.keep_adapter,
                started=started,
                reserve=reserve,
                tracker_directory=scratch / "trackers",
                progress=progress,
                log=log,
            )
        writing = time.monotonic()
        del model  # before the result is loaded beside it
        progress.phase("writing", 0, 1)
        changes = write_checkpoint(checked, outcome.finished.weights, scratch)
        verify_checkpoint(checked, outcome.finished.weights, scratch)
        _write_artifacts(outcome, checked, scratch)
        progress.phase("writing", 1, 1)
        manifest = _manifest(inputs, method, preset, checked, sets, outcome, device)
        manifest["changed_tensors"] = describe(changes)
        for warning in rounding_warnings(changes):
            manifest["warnings"].append(warning)
            progress.message(f"warning: {warning}")
        manifest["seconds"]["write"] = time.monotonic() - writing
        manifest["seconds"]["total"] = time.monotonic() - started
        manifest["output_sha256"] = {path.name: digest for path, digest in _digests(scratch)}
        text = json.dumps(_finite(manifest), indent=2, allow_nan=False)
        (scratch / MANIFEST).write_text(text + "\n", encoding="utf-8")
        _put_in_place(scratch, output)
    return manifest


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_sets(inputs: RunInputs) -> dict[str, RowSet]:
    sets = {"forget": read_rows(inputs.forget, "forget")}
    if inputs.retain is not None:
        sets["retain"] = read_rows(inputs.retain, "retain")
    if inputs.nonmembers is not None:
        sets["nonmembers"] = read_rows(inputs.nonmembers, "nonmembers")
    return sets


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: exists; choose another directory or give --overwrite")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; choose a directory")
    if output.is_dir() and not (output / MANIFEST).is_file() and any(output.iterdir()):
        raise InputError(
            f"--output {output}: --overwrite replaces earlier runs only, and this holds no"
            f" {MANIFEST}; choose another directory"
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--output {output}: {parent} is a file; choose another place")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--output {output}: {parent} cannot be written to; choose another place")


@contextmanager
def _scratch_beside(output: Path) -> Iterator[Path]:
    """A directory on the output's disk that is gone afterwards, whatever happens."""
    parent = output.absolute().parent
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for directory in made:
            if not any(directory.iterdir()):
                directory.rmdir()


def _put_in_place(scratch: Path, output: Path) -> None:
    """Renames the finished directory to its name; what was there is removed only afterwards."""
    scratch.chmod(0o755)
    if not output.exists():
        scratch.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.absolute().parent))
    output.rename(old / "run")
    try:
        scratch.rename(output)
    except OSError:
        (old / "run").rename(output)
        raise
    finally:
        shutil.rmtree(old)


def _write_artifacts(outcome: Outcome, checked: CheckedModel, scratch: Path) -> None:
    from safetensors.torch import save_file

    if outcome.artifacts:
        save_file(
            {name: tensor.contiguous() for name, tensor in outcome.artifacts.items()},
            scratch / DIRECTIONS,
        )
    finished = outcome.finished
    if finished.adapter is not None and finished.adapter_config is not None:
        adapter = scratch / ADAPTER
        adapter.mkdir()
        save_file(dict(finished.adapter), adapter / "adapter_model.safetensors")
        config = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in finished.adapter_config.items()
        }
        config["base_model_name_or_path"] = str(checked.files.directory)
        text = json.dumps(config, indent=2, default=str)
        (adapter / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _manifest(
    inputs: RunInputs,
    method: Method,
    preset: str | None,
    checked: CheckedModel,
    sets: Mapping[str, RowSet],
    outcome: Outcome,
    device: str,
) -> dict[str, Any]:
    history = outcome.history
    return {
        "status": "complete",
        "expunge": expunge.__version__,
        "settings": {
            "inputs": asdict(inputs),
            "method": {"name": method.name, **_method_settings(method)},
            "preset": preset,
            "preset_source": None if preset is None else method.presets[preset].source,
            "training": outcome.options,
        },
        "seed": outcome.options["seed"],
        "rows": {name: len(rows) for name, rows in sets.items()},
        "data_sha256": {name: dict(rows.sha256) for name, rows in sets.items()},
        "model_sha256": checked.files.sha256(),
        "device": device,
        "environment": environment(),
        "method_notes": dict(outcome.notes),
        "steps": history.steps,
        "selection": history.describe(),
        "seconds": dict(outcome.seconds),
        "peak_memory_bytes": _peak_memory(device),
        "warnings": list(outcome.warnings),
    }


def _method_settings(method: Method) -> dict[str, Any]:
    return asdict(method)  # type: ignore[call-overload]


def environment() -> dict[str, Any]:
    """Versions, machine and the state of the checkout that the package runs from."""
    return {
        "python": platform.python_version(),
        "libraries": {library: version(library) for library in _LIBRARIES},
        "machine": platform.machine(),
        "cpu_count": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the package's checkout and whether it has changes; null for an installed wheel."""
    package = Path(expunge.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return {"commit": git("rev-parse", "HEAD"), "changes": bool(git("status", "--porcelain"))}


def _peak_memory(device: str) -> dict[str, int]:
    import resource

    import torch

    unit = 1 if platform.system() == "Darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.startswith("cuda"):
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _digests(directory: Path) -> Iterator[tuple[Path, str]]:
    from expunge.data.formats import sha256_of

    for path in sorted(directory.iterdir()):
        if path.is_file():
            yield path, sha256_of(path)
