"""benchmarks/methods.py: table, distance, figure and tuning, and that nothing is run twice."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from expunge.evaluation.scorecard import Scorecard
from expunge.methods.catalog import METHODS
from expunge.search.space import read_space
from expunge.training.options import TrainingOptions

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("methods")


def card(forget: float, retain: float, auc: float | None, utility: float | None) -> Scorecard:
    def side(value: float) -> dict[str, dict[str, float | None]]:
        return {"Task1": {"regurgitation": value, "knowledge": value}, "Task2": {"knowledge": 0.5}}

    return Scorecard(side(forget), side(retain), 0.5, auc, None, utility, None)


def test_the_distance_is_a_mean_over_the_parts_that_both_have(methods: Any) -> None:
    one, oracle = card(0.2, 0.9, 0.7, None), card(0.1, 1.0, 0.5, 1.0)
    # Two cells a side differ by 0.1, one of Task2 a side by nothing, the AUC by 0.2.
    assert methods.distance(one, oracle) == pytest.approx((4 * 0.1 + 0 + 0 + 0.2) / 7)
    assert methods.distance(one, None) is None
    assert methods.distance(oracle, oracle) == 0


def test_the_parts_are_means_over_tasks_and_every_cell(methods: Any) -> None:
    parts = methods.parts_of(card(0.2, 0.9, None, None))
    assert parts["forget knowledge"] == pytest.approx((0.2 + 0.5) / 2)
    assert parts["retain regurgitation"] == 0.9
    assert parts["retain Task2 knowledge"] == 0.5
    assert parts["MIA AUC"] is None


def test_the_table_has_means_spreads_and_failures(methods: Any) -> None:
    row = methods.Row()
    row.add({"forget": 0.1, "forget knowledge": 0.1, "utility": None, "seconds": 10.0})
    row.add({"forget": 0.3, "forget knowledge": 0.3, "utility": None, "seconds": 14.0})
    failed = methods.Row(failures=["seed 0: no checkpoint can be kept"])
    text = methods.table({"npo": row, "rmu": failed})
    line = next(line for line in text.splitlines() if line.startswith("| npo"))
    assert "| 0.200 ± 0.141 |" in line
    assert "| 12 ± 3 |" in line
    assert line.count("| - ") >= 8
    assert "| rmu (0 of 1 seeds) |" in text
    assert "- rmu, seed 0: no checkpoint can be kept" in text


def test_only_the_section_between_the_markers_is_replaced(methods: Any) -> None:
    page = f"# Page\n{BEGIN}\nold \\1\n{END}\nafter\n"
    once = methods.replaced(page, methods.SECTION, "new \\g<0>\n")
    assert once.startswith("# Page\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert "new \\g<0>" in once
    assert methods.replaced(once, methods.SECTION, "new \\g<0>\n") == once
    with pytest.raises(SystemExit, match="needs one line"):
        methods.replaced("# Page\n", methods.SECTION, "new")


def test_the_figure_is_svg_with_every_model_where_it_is(methods: Any, tmp_path: Path) -> None:
    rows = {"target": methods.Row(), "a <b>": methods.Row(), "unmeasured": methods.Row()}
    rows["target"].add({"forget": 1.0, "retain": 1.0})
    for value in (0.2, 0.4):
        rows["a <b>"].add({"forget": value, "retain": 0.5})
    methods.write_figure(methods.points(rows), "title & more", tmp_path)
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"title & more", "target", "a <b>"} <= set(texts)
    assert "unmeasured" not in texts
    circles = [element for element in root.iter() if element.tag.endswith("circle")]
    # Retained 0.5, forgotten 0.7, of a square of 400 at (60, 40).
    assert (circles[0].get("cx"), circles[0].get("cy")) == ("260.0", "160.0")


@pytest.mark.parametrize("name", METHODS)
def test_a_search_space_lies_around_the_defaults_by_one_rule(
    name: str, methods: Any, tmp_path: Path
) -> None:
    tuning = importlib.import_module("tuning")
    # At this size a default learning rate is scaled by nothing.
    (tmp_path / "config.json").write_text('{"hidden_size": 256, "num_hidden_layers": 8}')
    method, defaults = METHODS[name](), METHODS[name].defaults
    space = read_space(tuning.search_words(name, tmp_path), method, TrainingOptions())
    rate, epochs, *strengths = space.dimensions
    assert (rate.name, epochs.name) == ("learning_rate", "epochs")
    assert math.sqrt(rate.low * rate.high) == pytest.approx(defaults.learning_rate, rel=1e-3)
    assert (epochs.low, epochs.high) == (defaults.epochs // 2, defaults.epochs * 2)
    assert len(strengths) <= 2
    for strength in strengths:
        value = getattr(method, strength.name.removeprefix("method."))
        assert math.sqrt(strength.low * strength.high) == pytest.approx(value, rel=1e-3)
        assert strength.high / strength.low == pytest.approx(100)


def test_reported_rows_are_not_tuned_on(methods: Any, tmp_path: Path) -> None:
    def given(benchmark: str, on: str, seed: int) -> argparse.Namespace:
        return argparse.Namespace(benchmarks=[benchmark], seeds=[0, 1], tune_on=on, tune_seed=seed)

    methods.check_unreported(given("builtin", "builtin", 100))
    methods.check_unreported(given(str(tmp_path), "builtin", 1))
    methods.check_unreported(given("builtin", str(tmp_path), 1))
    with pytest.raises(SystemExit, match="--tune-seed"):
        methods.check_unreported(given("builtin", "builtin", 1))
    with pytest.raises(SystemExit, match="--tune-on"):
        methods.check_unreported(given(str(tmp_path), str(tmp_path / "." / ""), 100))


def test_the_best_trial_becomes_options_of_a_run(methods: Any, tmp_path: Path) -> None:
    tuning = importlib.import_module("tuning")
    params = {"learning_rate": 0.25, "epochs": 3, "method.retain_weight": 1e-05}
    trials = [{"number": 0, "params": {}}, {"number": 1, "params": params}]
    result = {"best": 1, "trials": trials, "counts": {"ended": 2}}
    assert not tuning.has_ended(tmp_path, 1)
    (tmp_path / "sweep.json").write_text(json.dumps(result))
    assert tuning.best_options(tmp_path) == [
        "--learning-rate", "0.25", "--epochs", "3", "--method.retain-weight", "1e-05"
    ]  # fmt: skip
    assert (tuning.has_ended(tmp_path, 2), tuning.has_ended(tmp_path, 3)) == (True, False)
    (tmp_path / "sweep.json").write_text(json.dumps({**result, "best": None}))
    assert tuning.best_options(tmp_path) is None


def test_untuned_and_tuned_stand_side_by_side(methods: Any) -> None:
    rows = {name: methods.Row() for name in ("target", "npo", "npo (tuned)", "rmu", "rmu (tuned)")}
    rows["npo"].add({"final": 0.25, "utility": 1.0, "seconds": 30.0})
    rows["npo (tuned)"].add({"final": 0.75, "utility": 0.5, "seconds": 60.0})
    rows["rmu"].add({"final": 0.5})
    lines = methods.side_by_side(rows).splitlines()
    assert lines[0].startswith("| method | final ↑, untuned | final ↑, tuned |")
    assert lines[2:] == [
        "| npo | 0.250 | 0.750 | - | - | 1.000 | 0.500 | 30 | 60 |",
        "| rmu | 0.500 | - | - | - | - | - | - | - |",
    ]


@pytest.mark.slow
def test_a_benchmark_runs_once_and_a_failure_is_a_row(
    methods: Any,
    memorised_dir: Path,
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "mini"
    shutil.copytree(memorised_dir, directory / "target")
    for name, file in row_files.items():
        shutil.copy(file, directory / f"{name}.jsonl")
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n{BEGIN}\n{END}\n")
    command = [str(directory), "--output", str(tmp_path / "runs"), "--write", str(page)]
    monkeypatch.setattr(sys, "argv", ["methods.py", *command, "--seeds", "4", "--methods", "rmu", "npo"])
    material = importlib.import_module("material")
    original = material.expunge

    def narrow(arguments: list[str]) -> Any:
        # The defaults are for wider models; RMU is told to fail.
        if arguments[0] == "run":
            wrong = ["--method.layer", "99"] if "rmu" in arguments else ["--epochs", "2"]
            arguments = [*arguments, *wrong]
        return original(arguments)

    monkeypatch.setattr(material, "expunge", narrow)
    methods.main()
    first = page.read_text()
    assert "| target | 1.000 |" in first
    assert "| rmu (0 of 1 seeds) |" in first
    assert "--method.layer 99" in first
    assert "| npo |" in first
    assert (tmp_path / "methods-mini.svg").is_file()
    results = json.loads((tmp_path / "runs" / "mini" / "results.json").read_text())
    assert results["npo"]["memory"][0] > 0.1
    assert results["npo"]["seconds"][0] > 0

    def never(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        raise AssertionError(arguments)

    monkeypatch.setattr(material, "expunge", never)
    methods.main()
    assert page.read_text() == first


@pytest.mark.slow
def test_the_best_settings_of_a_sweep_run_on_the_reported_rows(
    methods: Any,
    memorised_dir: Path,
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for directory in (tmp_path / "reported", tmp_path / "other"):
        shutil.copytree(memorised_dir, directory / "target")
        for name, file in row_files.items():
            shutil.copy(file, directory / f"{name}.jsonl")
    command = [str(tmp_path / "reported"), "--output", str(tmp_path / "runs"), "--seeds", "4"]
    tuning = ["--tune", "2", "--tune-on", str(tmp_path / "other"), "--tune-seed", "7"]
    method = ["--methods", "gradient-difference"]
    monkeypatch.setattr(sys, "argv", ["methods.py", *command, *tuning, *method])
    # At four times its rate a model of width 16 is destroyed.
    for name in ("RATE", "STRENGTH"):
        monkeypatch.setattr(importlib.import_module("tuning"), name, 1.1)
    methods.main()
    place = tmp_path / "runs" / "reported"
    first = (place / "table.md").read_text()
    assert "| gradient-difference (tuned) |" in first
    [sweep] = (tmp_path / "runs").glob("tuning-other-seed7-2-float32/*/sweep.json")
    result = json.loads(sweep.read_text())
    assert result["counts"]["ended"] == 2
    best = next(trial for trial in result["trials"] if trial["number"] == result["best"])
    [run] = (place / "seed4").glob("gradient-difference-tuned-*/expunge.json")
    settings = json.loads(run.read_text())["settings"]
    assert settings["training"]["learning_rate"] == best["params"]["learning_rate"]
    assert settings["training"]["epochs"] == best["params"]["epochs"]
    assert settings["method"]["retain_weight"] == best["params"]["method.retain_weight"]

    def never(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        raise AssertionError(arguments)

    monkeypatch.setattr(importlib.import_module("material"), "expunge", never)
    methods.main()
    assert (place / "table.md").read_text() == first
