"""benchmarks/methods.py: its table, its distance, its figure, and that nothing is run twice."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from expunge.evaluation.scorecard import Scorecard

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
    monkeypatch.setattr(
        sys, "argv", ["methods.py", *command, "--seeds", "4", "--methods", "rmu", "npo"]
    )
    original = methods.expunge

    def narrow(arguments: list[str]) -> Any:
        # The defaults are for wider models; RMU is told to fail.
        if arguments[0] == "run":
            wrong = ["--method.layer", "99"] if "rmu" in arguments else ["--epochs", "2"]
            arguments = [*arguments, *wrong]
        return original(arguments)

    monkeypatch.setattr(methods, "expunge", narrow)
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

    monkeypatch.setattr(methods, "expunge", never)
    methods.main()
    assert page.read_text() == first
