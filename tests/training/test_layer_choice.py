"""`--method.layer auto`: chosen before anything is built for the layer, recorded, kept by --resume."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import mostly_slow, tiny_model
from expunge.analysis.layers import LayerChoice
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.rmu import RMU
from expunge.models.parts import WholeModel
from expunge.processes import OneProcess
from expunge.runs.run import RunInputs, check_run
from expunge.training import layer_choice
from expunge.training.layer_choice import extreme_layers, is_open, resolved_layer
from expunge.training.loop import Loop
from expunge.training.options import TrainingOptions
from expunge.training.progress import Silent
from expunge.training.unlearning import unlearn_model

Cli = Callable[..., tuple[int, str, str]]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def start(memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli) -> Run:
    def call(output: Path, *options: object) -> tuple[int, str, str]:
        return run_cli(
            *("run", memorised_dir, "--output", output, "--device", "cpu"),
            *("--method", "adaptive-rmu"),
            *("--forget", row_files["forget"], "--retain", row_files["retain"]),
            *("--learning-rate", 1e-3, "--batch-size", 3, "--epochs", 4, "--save-every", 3),
            *options,
        )

    return call


def notes(directory: Path) -> dict[str, Any]:
    record = json.loads((directory / "expunge.json").read_text(encoding="utf-8"))
    assert record["settings"]["method"]["layer"] == "auto"
    found: dict[str, Any] = record["method_notes"]
    return found


def refuse(*_: object) -> None:
    raise AssertionError("the rows were read once more")


@pytest.mark.parametrize("method", mostly_slow(["adaptive-rmu", "rmu"], "adaptive-rmu"))
def test_a_run_chooses_and_records_every_layers_scores(method: str, start: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = start(out, "--method", method)
    assert code == 0
    found = notes(out)
    choice = found["layer_choice"]
    assert found["layer"] == choice["layer"]
    assert [reading["layer"] for reading in choice["readings"]] == [2, 3]
    scores = {reading["layer"]: reading["score"] for reading in choice["readings"]}
    assert choice["layer"] == max(scores, key=lambda layer: scores[layer])
    assert f"layer {choice['layer']} of 0 to 3: highest score" in " ".join(err.split())
    given = tmp_path / "given"
    assert start(given, "--method", method, "--method.layer", choice["layer"], "--quiet")[0] == 0
    same = [(path / "model.safetensors").read_bytes() for path in (out, given)]
    assert same[0] == same[1]
    record = json.loads((given / "expunge.json").read_text())
    assert "layer_choice" not in record["method_notes"]


@pytest.mark.slow
def test_a_resumed_run_stays_with_its_layer_and_reads_no_row_again(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert start(whole, "--quiet")[0] == 0
    original = Loop._step

    def stepping(self: Loop, current: int, started: float) -> str | None:
        if current == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, current, started)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stepping)
        assert start(out, "--quiet")[0] == 130
    record = tmp_path / ".out.unfinished" / "layer.json"
    choice = json.loads(record.read_text())
    assert choice == notes(whole)["layer_choice"]
    with monkeypatch.context() as patch:
        patch.setattr(layer_choice, "choose_layer", refuse)
        code, _, err = start(out, "--resume")
    assert code == 0, err
    assert "(as before)" in err
    assert notes(out) == notes(whole)
    for name in ("model.safetensors", "expunge-directions.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_what_was_recorded_counts_not_what_the_rows_would_give(
    memorised_dir: Path, row_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, layout, parts = readied(memorised_dir, row_files)
    record = tmp_path / "layer.json"
    first = resolved_layer(prepared, layout, parts, nullcontext, Silent(), record=record)
    assert first.layer_choice is not None
    kept = first.layer_choice.to_json() | {"layer": 2}
    record.write_text(json.dumps(kept))
    monkeypatch.setattr(layer_choice, "choose_layer", refuse)
    again = resolved_layer(prepared, layout, parts, nullcontext, Silent(), record=record)
    assert again.method.trained_layers(layout) == (0, 2)


def readied(memorised_dir: Path, row_files: dict[str, Path], method: Any = None) -> Any:
    from expunge.models.loading import load_model

    inputs = RunInputs(
        str(memorised_dir), str(row_files["forget"]), "", str(row_files["retain"]), device="cpu"
    )
    checked, _, prepared = check_run(inputs, method or AdaptiveRMU(), TrainingOptions(), writes=False)
    return prepared, checked.layout, WholeModel(load_model(checked, "float32", "cpu"))


class Second(OneProcess):
    """The second of two processes; the first found `said`."""

    rank, count, is_main = 1, 2, False

    def __init__(self, *said: Any) -> None:
        self._said = list(said)

    def gather(self, value: Any) -> list[Any]:
        return [self._said.pop(0), value]


def test_every_process_goes_on_with_what_the_main_one_found(
    memorised_dir: Path, row_files: dict[str, Path], tmp_path: Path
) -> None:
    prepared, layout, parts = readied(memorised_dir, row_files)
    mine = resolved_layer(prepared, layout, parts, nullcontext, Silent())
    assert mine.layer_choice is not None
    other = mine.layer_choice.to_json() | {"layer": 2}
    record = tmp_path / "layer.json"
    second = Second(None, other)  # nothing on disk, then what it chose
    found = resolved_layer(
        prepared, layout, parts, nullcontext, Silent(), processes=second, record=record
    )
    assert found.layer_choice == LayerChoice.from_json(other)
    assert not record.exists()
    resumed = resolved_layer(prepared, layout, parts, nullcontext, Silent(), processes=Second(other))
    assert resumed.layer_choice == LayerChoice.from_json(other)


@pytest.mark.parametrize("method", [AdaptiveRMU(layer=2), RMU(layer=3)])
def test_a_given_layer_is_left_alone(
    method: Any, memorised_dir: Path, row_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_choice, "choose_layer", refuse)
    prepared, layout, parts = readied(memorised_dir, row_files, method)
    assert not is_open(prepared)
    assert resolved_layer(prepared, layout, parts, nullcontext, Silent()) is prepared
    assert extreme_layers(layout) == [3, 2]


def test_a_warning_of_the_choice_is_one_of_the_run(
    memorised_dir: Path,
    tokenizer: Any,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
) -> None:
    """The Python interface, on a model whose every answer is as likely as any other."""
    model = tiny_model("olmo", len(tokenizer))
    for parameter in model.parameters():
        parameter.data.zero_()
    options = TrainingOptions(epochs=1, select="last", unknown_rows="unlearn")
    outcome = unlearn_model(model, tokenizer, AdaptiveRMU(), forget_rows, retain_rows, options=options)
    assert outcome.notes["layer"] == 2
    assert any("prompts do not help the target" in warning for warning in outcome.warnings)
    assert isinstance(next(iter(outcome.finished.weights.values())), torch.Tensor)


def test_no_forget_text_in_the_record_or_on_the_screen(
    start: Run, tmp_path: Path, forget_rows: list[dict[str, str]]
) -> None:
    code, out, err = start(tmp_path / "out")
    assert code == 0
    written = (tmp_path / "out" / "expunge.json").read_text()
    for row in forget_rows:
        for column in ("input", "output"):
            assert row[column] not in written + out + err
