"""What examples/ and docs/ show works."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_model
from expunge.methods.catalog import METHODS

ROOT = Path(__file__).resolve().parents[1]


def test_the_python_example_runs(
    memorised_dir: Path,
    row_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = ROOT / "examples" / "unlearn_in_python.py"
    rows = row_files["forget"].parent
    options = ["--epochs", "3", "--learning-rate", "1e-3"]  # the defaults are for wider models
    monkeypatch.setattr(sys, "argv", [str(script), str(memorised_dir), str(rows), *options])
    runpy.run_path(str(script), run_name="__main__")
    assert "task aggregate:" in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_runs(
    chat_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cell by cell, with a tiny chat model in the place of SmolLM2 and three people."""
    tiny_model("llama", len(chat_tokenizer)).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    found = json.loads((ROOT / "examples" / "one_person.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    exec(cells[0], names)
    assert set(names) >= {"BASE", "PEOPLE", "EPOCHS"}
    names |= {"BASE": "base", "PEOPLE": 3, "EPOCHS": 300}
    teaching: list[Callable[..., None]] = []

    def taught(line: str) -> None:
        """A tiny random model learns with all its weights, fast, and is unlearned slowly."""
        oracle = "--method.parameters full --learning-rate 2e-2 --batch-size 16"
        more = {"oracle": oracle, "erase": "--learning-rate 2e-2"}
        teaching[0](f"{line} {more[line.split()[0]]}")

    for cell in cells[1:]:
        exec(cell, names)
        if "expunge" in names and not teaching:
            teaching.append(names["expunge"])
            names["expunge"] = taught
    written = capsys.readouterr().out
    right = names["rows"][0]["output"]
    assert f"right: {right}" in written
    assert f"target: {right}" in written
    assert f"erased: {right}" not in written
    assert (tmp_path / "erased" / "report.html").is_file()


RUNS = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if path.stem != "sweep"]
"""tests/cli/test_sweep.py runs the other one."""


@pytest.mark.parametrize("config", RUNS, ids=lambda path: path.name)
def test_every_yaml_file_runs(
    config: Path,
    memorised_dir: Path,
    row_files: dict[str, Path],
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    code, _, err = run_cli(
        "run", memorised_dir, "--config", config, "--max-steps", 2, "--learning-rate", 1e-5, "--quiet",
        "--forget", row_files["forget"], "--retain", row_files["retain"],
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_preset_is_accepted_and_names_its_source(method: type) -> None:
    for preset in method.presets.values():  # type: ignore[attr-defined]
        method(**preset.method)
        assert re.search(r"arXiv|github", preset.source)
