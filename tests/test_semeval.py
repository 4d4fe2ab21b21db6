"""The task's entry point on the task's own file names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import refusal
from expunge.methods.libu import LIBU
from expunge.semeval import unlearn


@pytest.fixture
def directories(row_files: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    for side in ("forget", "retain"):
        (tmp_path / side).mkdir()
        shutil.copy(row_files[side], tmp_path / side / f"{side}.jsonl")
    return tmp_path / "forget", tmp_path / "retain"


@pytest.mark.parametrize("method", [None, LIBU(rank=4)])
def test_a_checkpoint_is_left_that_loads(
    method: LIBU | None, memorised_dir: Path, directories: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    out.mkdir()  # the task's harness makes it
    manifest = unlearn(
        memorised_dir, out, *directories, method=method, epochs=2, learning_rate=1e-3, device="cpu"
    )
    AutoModelForCausalLM.from_pretrained(out)
    assert manifest["settings"]["training"]["time_limit"] == "55m"
    assert json.loads((out / "expunge.json").read_text())["status"] == manifest["status"]


def test_what_is_there_is_not_touched(
    memorised_dir: Path, directories: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    refusal(lambda: unlearn(memorised_dir, tmp_path, *directories))
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_an_unknown_option_is_named(directories: tuple[Path, Path], tmp_path: Path) -> None:
    message = refusal(lambda: unlearn("model", tmp_path / "out", *directories, epoch=3))
    assert message.startswith("epoch:")
