"""What examples/ and docs/ show works."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
