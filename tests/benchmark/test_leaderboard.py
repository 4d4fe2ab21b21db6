"""benchmarks/leaderboard.py: what an entry says, what is refused, and the table of its entries."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expunge.data.fingerprints import data_fingerprint
from expunge.data.formats import Role
from expunge.data.rows import read_rows
from expunge.evaluation.score_files import scores_text
from expunge.evaluation.scorecard import Cells, Scorecard
from expunge.methods.wga import WGA
from expunge.runs.manifest import settings_of
from expunge.training.options import TrainingOptions, resolved

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROLES: tuple[Role, ...] = ("forget", "retain")
TARGET, MODEL = "a" * 64, "b" * 64
PAGE = "# Page\n<!-- leaderboard: begin -->\n<!-- leaderboard: end -->\nafter\n"


@pytest.fixture
def leaderboard(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("leaderboard")


@pytest.fixture
def benchmark_dir(row_files: dict[str, Path], tmp_path: Path) -> Path:
    """The record and the configuration of a benchmark whose target has width 256."""
    directory = tmp_path / "benchmark"
    (directory / "target").mkdir(parents=True)
    sizes = {"hidden_size": 256, "num_hidden_layers": 8}
    (directory / "target" / "config.json").write_text(json.dumps(sizes))
    files = {
        f"{name}.jsonl": hashlib.sha256(row_files[name].read_bytes()).hexdigest()
        for name in ("forget", "retain")
    }
    files["target/model.safetensors"] = TARGET
    record = {"content_hash": "c" * 64, "settings": {"seed": 3}, "files": files}
    (directory / "benchmark.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def make_run(row_files: dict[str, Path], tmp_path: Path) -> Any:
    """Writes the files of a run of WGA with these options, on the benchmark's rows."""

    def make(name: str, final: float, alpha: float = 1.0, **options: Any) -> Path:
        method, layout = WGA(alpha=alpha), SimpleNamespace(width=256, count=8)
        used = resolved(method, TrainingOptions(**options), cast("Any", layout), 32)
        manifest = {
            "expunge": "0.0.1",
            "settings": {
                "method": settings_of(method),
                "training": {**asdict(used), "dtype": "float32", "yardstick": "nonmembers"},
            },
            "seed": used.seed,
            "data_hmac_sha256": {
                role: data_fingerprint(read_rows(str(row_files[role]), role)) for role in ROLES
            },
            "environment": {"git": {"commit": "0123456789abcdef", "changes": True}},
            "model_sha256": {"model.safetensors": TARGET},
            "output_sha256": {"model.safetensors": MODEL},
            "resumed_from_steps": [],
            "seconds": {"total": 61.4},
        }
        forget: Cells = {"Task1": {"regurgitation": 0.25, "knowledge": 0.75}}
        card = Scorecard(forget, {"Task1": {"knowledge": 1.0}}, 0.5, 0.75, 0.5, 1.0, final)
        run = tmp_path / name
        run.mkdir()
        (run / "expunge.json").write_text(json.dumps(manifest))
        (run / "scores.json").write_text(scores_text(card, name, {"model.safetensors": MODEL}))
        return run

    return make


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_entry_has_the_figures_and_what_differs_from_the_defaults(
    leaderboard: Any, benchmark_dir: Path, make_run: Any
) -> None:
    usual = leaderboard.entry_of(make_run("usual", 0.5), benchmark_dir)
    assert usual["changed"] == {}
    assert (usual["benchmark"], usual["method"], usual["audit"]) == ("builtin, seed 3", "wga", None)
    assert (usual["forget"], usual["mia_auc"], usual["utility"]) == (0.5, 0.75, 1.0)
    assert (usual["seconds"], usual["code"]) == (61.4, "012345678+")
    other = make_run("other", 0.5, alpha=2.0, learning_rate=0.5, seed=1)
    assert leaderboard.entry_of(other, benchmark_dir)["changed"] == {
        "learning_rate": 0.5,
        "method.alpha": 2.0,
    }


def test_the_settings_hash_is_of_the_settings_alone(
    leaderboard: Any, benchmark_dir: Path, make_run: Any
) -> None:
    runs = {
        "one": make_run("one", 0.5),
        "another seed": make_run("two", 0.6, seed=5),
        "another strength": make_run("three", 0.5, alpha=2.0),
        "other epochs": make_run("four", 0.5, epochs=3),
    }
    found = {
        name: leaderboard.entry_of(run, benchmark_dir)["settings_sha256"] for name, run in runs.items()
    }
    assert found["one"] == found["another seed"]
    assert len(set(found.values())) == 3


def test_an_audit_of_the_model_gives_its_verdict(
    leaderboard: Any, benchmark_dir: Path, make_run: Any
) -> None:
    run = make_run("run", 0.5)
    models = {"unlearned": {"sha256": {"model.safetensors": MODEL}}}
    audit = {"verdict": {"verdict": "forgotten"}, "models": models}
    (run / "audit.json").write_text(json.dumps(audit))
    assert leaderboard.entry_of(run, benchmark_dir)["audit"] == "forgotten"
    change(run / "audit.json", models={"unlearned": {"sha256": {"model.safetensors": "d" * 64}}})
    with pytest.raises(SystemExit, match=r"audit\.json: is not of the model"):
        leaderboard.entry_of(run, benchmark_dir)


@pytest.mark.parametrize(
    ("file", "values", "refusal"),
    [
        ("expunge.json", {"model_sha256": {"model.safetensors": MODEL}}, "did not begin"),
        ("expunge.json", {"data_hmac_sha256": {"forget": "x:y"}}, "its forget rows are not"),
        ("scores.json", {"model_sha256": {"model.safetensors": TARGET}}, "is not of the model"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    file: str,
    values: dict[str, Any],
    refusal: str,
    leaderboard: Any,
    benchmark_dir: Path,
    make_run: Any,
) -> None:
    run = make_run("run", 0.5)
    change(run / file, **values)
    with pytest.raises(SystemExit, match=refusal):
        leaderboard.entry_of(run, benchmark_dir)
    (run / file).unlink()
    with pytest.raises(SystemExit, match=f"{file}: not found"):
        leaderboard.entry_of(run, benchmark_dir)


def test_entries_stay_are_replaced_and_make_the_table(
    leaderboard: Any,
    benchmark_dir: Path,
    make_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)

    def write(*runs: Path) -> list[str]:
        given = [*map(str, runs), "--benchmark", str(benchmark_dir), "--write", str(page)]
        monkeypatch.setattr(sys, "argv", ["leaderboard.py", *given])
        leaderboard.main()
        return [line for line in page.read_text().splitlines() if line.startswith("| builtin")]

    assert len(write(make_run("first", 0.25))) == 1
    lines = write(make_run("better", 0.75, alpha=2.0))
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["wga", "0", "`method.alpha` 2", "0.750"],
        ["wga", "0", "-", "0.250"],
    ]
    assert write(make_run("again", 0.5))[1].split(" | ")[4] == "0.500"
    whole = page.read_text()
    assert whole.endswith("after\n")
    page.write_text(PAGE)
    assert len(write()) == 2
    assert page.read_text() == whole
