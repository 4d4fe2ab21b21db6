"""`expunge demo` on a tiny benchmark in the place of the built-in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import write_jsonl
from expunge.benchmark import build as benchmark
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.base import RunDefaults
from expunge.methods.libu import LIBU
from expunge.methods.spectral import Spectral

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiny_benchmark(
    memorised_dir: Path,
    oracle_dir: Path,
    row_files: dict[str, Path],
    forget_rows: list[dict[str, str]],
    quiz_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    directory = tmp_path / "benchmark"
    directory.mkdir()
    for path in row_files.values():
        shutil.copy(path, directory)
    shutil.copy(row_files["nonmembers"], directory / "calibration.jsonl")
    shutil.copytree(quiz_dir, directory / "mmlu")
    questions = [row for row in forget_rows if row["id"].endswith("qa0")]
    asked = [
        {"id": f"p{n}", "of": row["id"], "input": row["input"], "output": row["output"]}
        for n, row in enumerate(questions)
    ]
    write_jsonl(directory / "paraphrases.jsonl", asked)
    shutil.copytree(memorised_dir, directory / "target")
    shutil.copytree(oracle_dir, directory / "oracle")

    def build(*_: Any) -> benchmark.BuiltBenchmark:
        return benchmark.BuiltBenchmark(directory)

    monkeypatch.setattr(benchmark, "build", build)
    for method in (Spectral, LIBU, AdaptiveRMU):  # the defaults are for wider models
        monkeypatch.setattr(method, "defaults", RunDefaults(3, 4, 1e-3 / 16))
    return directory


def test_the_demo_ends_with_a_verdict_on_the_default_method(
    tiny_benchmark: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    output = tmp_path / "demo"
    code, out, err = run_cli("demo", output, "--quiet")
    assert (code, err) == (0, ""), err
    # A long path is broken over lines.
    assert f"Auditof{output / 'spectral'}" in "".join(out.split())
    audit = json.loads((output / "spectral" / "audit.json").read_text())
    [request] = audit["requests"]
    assert {"direct", "paraphrase", "relearn", "membership"} <= set(request["attacks"])
    last = [line for line in out.splitlines() if line.startswith("Verdict: ")]
    assert last == [f"Verdict: {audit['verdict']['verdict']}: {audit['verdict']['sentence']}"]
    assert "<html" in (output / "spectral" / "report.html").read_text()


@pytest.mark.slow
def test_the_demo_compares_methods_with_target_and_oracle(
    tiny_benchmark: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    output = tmp_path / "demo"
    methods = ("--methods", "libu", "adaptive-rmu", "--no-audit")
    code, out, err = run_cli("demo", output, *methods, "--quiet")
    assert (code, err) == (0, "")
    for name in ("target", "oracle", "libu", "adaptive-rmu", "task aggregate", "final score"):
        assert name in out
    for name in ("libu", "adaptive-rmu"):
        scores = json.loads((output / name / "scores.json").read_text())
        assert 0 <= scores["final_score"] <= 1
        report = json.loads((output / name / "report.json").read_text())
        # Target and oracle were found beside the run.
        roles = {column["role"] for column in report["scorecard"]["columns"]}
        assert roles == {"target", "unlearned", "oracle"}
        assert "<html" in (output / name / "report.html").read_text()
    code, _, err = run_cli("demo", output, *methods, "--quiet")
    assert code == 2
    assert "--overwrite" in err
    assert "--resume" in err
    manifest = (output / "libu" / "expunge.json").read_bytes()
    shutil.rmtree(output / "adaptive-rmu")
    assert run_cli("demo", output, *methods, "--quiet", "--resume")[0] == 0
    assert (output / "libu" / "expunge.json").read_bytes() == manifest
    assert (output / "adaptive-rmu" / "report.html").is_file()
    assert run_cli("demo", output, *methods, "--quiet", "--overwrite")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_products_are_those_that_the_device_has(
    native: bool,
    dtype: str,
    tiny_benchmark: Path,
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"avx512_bf16": native, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    options = ("--methods", "libu", "--no-audit", "--device", "cpu", "--quiet")
    assert run_cli("demo", tmp_path / "demo", *options)[0] == 0
    manifest = json.loads((tmp_path / "demo" / "libu" / "expunge.json").read_text())
    assert manifest["settings"]["inputs"]["dtype"] == dtype
    kept = load_file(tmp_path / "demo" / "libu" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_an_unknown_method_is_refused(run_cli: Cli) -> None:
    code, _, err = run_cli("demo", "--methods", "libo")
    assert code == 2
    assert "choose from spectral, libu, adaptive-rmu" in err
