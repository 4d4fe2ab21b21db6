"""A sweep over layers: what each run gives alone, resumable, its agreement with the prediction."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import refusal
from expunge.analysis.layers import LayerChoice, LayerReading
from expunge.errors import Interrupted, RunError
from expunge.evaluation import generation
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.npo import NPO
from expunge.models.engine import SegmentEngine
from expunge.search import layer_sweep
from expunge.search.layer_sweep import (
    LayerInputs,
    LayerResult,
    LayerSweep,
    agreement,
    chosen_layers,
    predict,
    sweep_layers,
)
from expunge.training.loop import Loop
from expunge.training.options import TrainingOptions

Sweep = Callable[..., LayerSweep]
OPTIONS = TrainingOptions(epochs=2, learning_rate=1e-3, batch_size=4)


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 20)


@pytest.fixture
def inputs(memorised_dir: Path, row_files: dict[str, Path], tmp_path: Path) -> LayerInputs:
    return LayerInputs(
        model=str(memorised_dir),
        forget=str(row_files["forget"]),
        retain=str(row_files["retain"]),
        score_nonmembers=str(row_files["nonmembers"]),
        output=str(tmp_path / "out"),
        device="cpu",
    )


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_every_layer_is_run_scored_and_recorded(inputs: LayerInputs, tmp_path: Path) -> None:
    sweep = sweep_layers(inputs, AdaptiveRMU(), OPTIONS)
    out = tmp_path / "out"
    assert [result.layer for result in sweep.results] == [2, 3]
    assert sweep.complete
    for result in sweep.results:
        directory = out / f"layer-0{result.layer}"
        scores = read(directory / "scores.json")
        assert result.scores is not None
        assert all(scores[name] == value for name, value in result.scores.items())
        record = read(directory / "expunge.json")
        assert record["method_notes"]["layer"] == result.layer
        assert result.selection["chosen_step"] == record["selection"]["chosen_step"]
        assert result.scores["utility"] is None
        parts = [result.scores["task_aggregate"], result.scores["mia_score"]]
        assert result.value == pytest.approx(sum(parts) / 2)
        assert result.seconds["run"] > 0
    written = read(out / "layers.json")
    assert LayerSweep.from_json(written) == sweep
    assert written["status"] == "complete"
    assert written["agreement"]["measured_by"] == "mean of task_aggregate and mia_score"
    best = sweep.agreement.best
    models = [path.parent.name for path in out.glob("*/model.safetensors")]
    assert models == [f"layer-0{best}"]
    # Hidden states of forget text are gone.
    assert {path.name for path in out.iterdir()} == {"layers.json", "layer-02", "layer-03"}


def test_sharing_states_changes_no_byte_and_saves_the_layers_below(
    inputs: LayerInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    original = SegmentEngine._groups

    def groups(self: SegmentEngine, begun_at: int = 0) -> list[tuple[int, int]]:
        found = original(self, begun_at)
        begun.append(found)
        return found

    monkeypatch.setattr(SegmentEngine, "_groups", groups)
    sweep_layers(dataclasses.replace(inputs, keep="all"), AdaptiveRMU(), OPTIONS)
    assert begun == [[(0, -1)], [(0, 0)]]  # nothing lies below layer 0 that could be handed on
    alone = dataclasses.replace(inputs, output=str(tmp_path / "alone"), layers=(3,), keep="all")
    sweep_layers(alone, AdaptiveRMU(), OPTIONS)
    for name in ("model.safetensors", "scores.json"):
        shared, single = (tmp_path / d / "layer-03" / name for d in ("out", "alone"))
        if name == "scores.json":
            assert read(shared) | {"model": ""} == read(single) | {"model": ""}
        else:
            assert shared.read_bytes() == single.read_bytes()


def test_it_goes_on_where_it_was_stopped_and_repeats_no_layer(
    inputs: LayerInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep_layers(
        dataclasses.replace(inputs, output=str(tmp_path / "whole"), keep="all"),
        AdaptiveRMU(),
        OPTIONS,
    )
    steps = 0
    original = Loop._step

    def stepping(self: Loop, current: int, started: float) -> str | None:
        nonlocal steps
        steps += 1
        if steps == 6:  # in the second layer's run, of four steps each
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, current, started)

    stopped = dataclasses.replace(inputs, keep="all")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stepping)
        with pytest.raises(Interrupted, match="--resume"):
            sweep_layers(stopped, AdaptiveRMU(), OPTIONS)
    out = tmp_path / "out"
    assert [layer["layer"] for layer in read(out / "layers.json")["layers"]] == [2]
    assert read(out / "layers.json")["status"] == "unfinished"
    message = refusal(lambda: sweep_layers(stopped, AdaptiveRMU(), OPTIONS))
    assert "go on with --resume" in message
    resume = dataclasses.replace(stopped, resume=True)
    message = refusal(lambda: sweep_layers(resume, AdaptiveRMU(beta=3.0), OPTIONS))
    assert "method.beta 5.0, this one has 3.0" in message
    other = dataclasses.replace(OPTIONS, seed=1)
    assert "training.seed 0, this one has 1" in refusal(
        lambda: sweep_layers(resume, AdaptiveRMU(), other)
    )
    before = read(out / "layers.json")["layers"][0]
    monkeypatch.setattr(layer_sweep, "read_layers", lambda *_: pytest.fail("predicted again"))
    found = sweep_layers(resume, AdaptiveRMU(), OPTIONS)
    assert read(out / "layers.json")["layers"][0] == before
    for mine, uncut in zip(found.results, whole.results, strict=True):
        assert (mine.layer, mine.scores, mine.selection) == (
            uncut.layer, uncut.scores, uncut.selection,
        )  # fmt: skip
        paths = [tmp_path / d / f"layer-0{mine.layer}" for d in ("out", "whole")]
        weights = [(path / "model.safetensors").read_bytes() for path in paths]
        assert weights[0] == weights[1]
    monkeypatch.setattr(layer_sweep, "run", lambda *_: pytest.fail("ran again"))
    assert sweep_layers(resume, AdaptiveRMU(), OPTIONS) == found


def test_layers_can_be_added_to_a_sweep(inputs: LayerInputs) -> None:
    one = dataclasses.replace(inputs, layers=(3,))
    assert [r.layer for r in sweep_layers(one, AdaptiveRMU(), OPTIONS).results] == [3]
    both = dataclasses.replace(inputs, resume=True)
    found = sweep_layers(both, AdaptiveRMU(), OPTIONS)
    assert [result.layer for result in found.results] == [2, 3]


def test_a_layer_that_keeps_no_checkpoint_is_a_result(
    inputs: LayerInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expunge.training.run import run as original

    def failing(run_inputs: Any, method: Any, *rest: Any) -> Any:
        if method.layer == 2:
            raise RunError("no checkpoint can be kept (4 measured)")
        return original(run_inputs, method, *rest)

    monkeypatch.setattr(layer_sweep, "run", failing)
    sweep = sweep_layers(inputs, AdaptiveRMU(), OPTIONS)
    assert sweep.results[0].failure == "no checkpoint can be kept (4 measured)"
    assert sweep.results[0].value is None
    assert sweep.agreement.best == 3
    assert sweep.agreement.layers == 1
    assert sweep.agreement.rank_correlation is None
    assert LayerSweep.from_json(read(tmp_path / "out" / "layers.json")) == sweep


def test_no_forget_text_in_any_written_file(
    inputs: LayerInputs, tmp_path: Path, forget_rows: list[dict[str, str]]
) -> None:
    sweep_layers(inputs, AdaptiveRMU(), OPTIONS)
    secrets = [row[column] for row in forget_rows for column in ("input", "output")]
    searched = 0
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and not path.name.startswith("tokenizer"):  # the target's own
            searched += 1
            content = path.read_bytes()
            assert [secret for secret in secrets if secret.encode() in content] == []
    assert searched > 6


def test_the_prediction_alone_writes_nothing(inputs: LayerInputs, tmp_path: Path) -> None:
    alone = dataclasses.replace(inputs, output="", predict_only=True)
    choice = predict(alone, AdaptiveRMU(), OPTIONS)
    assert [reading.layer for reading in choice.readings] == [2, 3]
    assert list(tmp_path.iterdir()) == []
    sweep = sweep_layers(inputs, AdaptiveRMU(), OPTIONS)
    assert sweep.prediction == choice


@pytest.mark.parametrize(
    ("changed", "method", "words"),
    [
        ({"layers": (1,)}, AdaptiveRMU(), ("--layers 1", "choose 2 to 3")),
        ({}, NPO(), ("--method npo: steers no layer", "adaptive-rmu")),
        ({"mmlu": "nowhere"}, AdaptiveRMU(), ("nowhere",)),
        ({"score_nonmembers": "nowhere.jsonl"}, AdaptiveRMU(), ("nowhere.jsonl",)),
        ({"retain": None}, AdaptiveRMU(), ("--method adaptive-rmu: needs a retain set",)),
        ({"mmlu_shots": 2}, AdaptiveRMU(), ("--mmlu-shots",)),
    ],
    ids=str,
)
def test_wrong_input_is_refused_before_anything_is_written(
    changed: dict[str, Any],
    method: Any,
    words: tuple[str, ...],
    inputs: LayerInputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_sweep, "read_layers", lambda *_: pytest.fail("weights were read"))
    message = refusal(lambda: sweep_layers(dataclasses.replace(inputs, **changed), method, OPTIONS))
    assert all(word in message for word in words)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_something_else_is_left_alone(
    inputs: LayerInputs, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    overwrite = dataclasses.replace(inputs, overwrite=True)
    for given in (inputs, overwrite):
        message = refusal(lambda given=given: sweep_layers(given, AdaptiveRMU(), OPTIONS))  # type: ignore[misc]
        assert "holds no layers.json" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_two_sweeps_do_not_work_on_one_output(inputs: LayerInputs, tmp_path: Path) -> None:
    with layer_sweep._held(tmp_path / "out"):
        message = refusal(lambda: sweep_layers(inputs, AdaptiveRMU(), OPTIONS))
        assert "another process is at work on it" in message
    assert list(tmp_path.iterdir()) == []


def test_overwrite_discards_what_an_earlier_sweep_left(inputs: LayerInputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".layer-02.unfinished").mkdir(parents=True)
    (out / "layer-03").mkdir()
    (out / "layers.json").write_text("{}")
    (out / "layers.html").write_text("old")
    resume = dataclasses.replace(inputs, resume=True)
    message = refusal(lambda: sweep_layers(resume, AdaptiveRMU(), OPTIONS))
    assert "is not what a sweep wrote; discard it with --overwrite" in message
    overwrite = dataclasses.replace(inputs, overwrite=True, layers=(2,), keep="none")
    assert sweep_layers(overwrite, AdaptiveRMU(), OPTIONS).complete
    assert sorted(path.name for path in out.iterdir()) == ["layer-02", "layers.html", "layers.json"]
    assert not list(out.rglob("*.safetensors.index.json"))
    assert not (out / "layer-02" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": ""}, "--output: is needed"),
        ({"layers": (2,), "every": 2}, "--every: excludes --layers"),
        ({"every": 0}, "--every 0: must be 1 or more"),
    ],
)
def test_options_that_contradict_are_refused(
    options: dict[str, Any], message: str, inputs: LayerInputs
) -> None:
    assert message in refusal(lambda: dataclasses.replace(inputs, **options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(range(2, 16))),
        ({"every": 4}, [3, 7, 11, 15]),
        ({"every": 100}, [15]),
        ({"layers": (9, 4, 9)}, [4, 9]),
    ],
)
def test_which_layers_are_run(
    options: dict[str, Any], expected: list[int], inputs: LayerInputs, memorised_dir: Path
) -> None:
    from expunge.models.loading import check_model

    layout = dataclasses.replace(check_model(str(memorised_dir)).layout, count=16)
    assert chosen_layers(dataclasses.replace(inputs, **options), layout) == expected


def prediction(scores: dict[int, float | None]) -> LayerChoice:
    readings = tuple(
        LayerReading(layer, score, None, None, None, 0.0, 0.0, 0.0, 0.0)
        for layer, score in scores.items()
    )
    return LayerChoice(3, "", None, readings, {}, None, None)


def result(layer: int, **scores: float | None) -> LayerResult:
    parts = {"task_aggregate": None, "mia_score": None, "utility": None, **scores}
    return LayerResult(layer, None, parts, {}, {"run": 1.0, "scoring": 1.0})


def test_the_agreement_of_prediction_and_measurement() -> None:
    predicted = prediction({2: 0.1, 3: 0.4, 4: 0.9, 5: 0.7})
    results = [
        result(layer, task_aggregate=value, mia_score=value, utility=value)
        for layer, value in ((2, 0.2), (3, 0.3), (4, 0.5), (5, 0.6))
    ]
    found = agreement(predicted, results)
    assert (found.best, found.predicted, found.layers) == (5, 4, 4)
    assert found.measured_by == "final score"
    assert found.loss == pytest.approx(0.1)
    assert found.rank_correlation == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)


def test_the_agreement_leaves_out_what_was_not_measured() -> None:
    failed = LayerResult(4, "no checkpoint", None, {}, {"run": 1.0, "scoring": 0.0})
    results = [result(3, task_aggregate=0.4), failed]
    found = agreement(prediction({3: 0.2, 4: 0.9}), results)
    assert (found.best, found.predicted, found.loss) == (3, 3, 0.0)
    assert found.measured_by == "mean of task_aggregate"
    nothing = agreement(prediction({3: None}), results)
    assert (nothing.predicted, nothing.loss, nothing.rank_correlation) == (None, None, None)
    assert agreement(prediction({}), [failed]).best is None
