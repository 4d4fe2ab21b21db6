"""Audits of requests of a few rows end to end, with the defaults of the budget quick."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def audited(
    run_cli: Cli, memorised_dir: Path, oracle_dir: Path, row_files: dict[str, Path], tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], str]]:
    def call(model: Path, rows: list[dict[str, str]], *options: object) -> tuple[dict[str, Any], str]:
        forget = write_jsonl(tmp_path / "few.jsonl", rows)
        output = tmp_path / "audit.json"
        code, out, err = run_cli(
            *("audit", model, "--original", memorised_dir, "--oracle", oracle_dir),
            *("--forget", forget, "--retain", row_files["retain"], "--output", output),
            *("--learning-rate", 5e-3, "--device", "cpu", "--quiet", *options),
        )
        assert code == 0, err
        report: dict[str, Any] = json.loads(output.read_text())
        return report, out

    return call


def test_one_document_is_relearned_on_other_peoples_rows(
    audited: Callable[..., tuple[dict[str, Any], str]],
    forgetful_dir: Path,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
) -> None:
    rows = forget_rows[:2]
    report, out = audited(forgetful_dir, rows, "--attacks", "relearn")
    attack = report["requests"][0]["attacks"]["relearn"]
    alike = [row for row in retain_rows if row["task"] == rows[0]["task"]]
    for model in attack["models"].values():
        assert model["numbers"]["tuned_on"] == "retain"
        assert model["numbers"]["rows_tuned_on"] == [len(alike)]
        assert {each["rows"] for each in model["variants"].values()} == {2}
    if attack["power"]["has_power"]:
        assert "after tuning on retain rows, as no other document is forgotten" in out
    # Of two documents one is tuned on, as ever.
    report, _ = audited(forgetful_dir, forget_rows[:4], "--attacks", "relearn")
    for model in report["requests"][0]["attacks"]["relearn"]["models"].values():
        assert "tuned_on" not in model["numbers"]
        assert model["numbers"]["rows_tuned_on"] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "apart"), [(1, False), (3, False), (6, False), (8, True)])
def test_a_small_request_has_a_verdict_by_the_defaults(
    rows: int,
    apart: bool,
    audited: Callable[..., tuple[dict[str, Any], str]],
    forgetful_dir: Path,
    nudged_dir: Path,
    forget_rows: list[dict[str, str]],
    row_files: dict[str, Path],
) -> None:
    """The last ones are documents of their own, more than few."""
    chosen = [forget_rows[1], forget_rows[0], *forget_rows[2:]][:rows]
    if apart:
        chosen = [{**row, "id": f"row {n}"} for n, row in enumerate(chosen)]
    seen = ("--nonmembers", row_files["nonmembers"])
    report, out = audited(forgetful_dir, chosen, *seen)
    request = report["requests"][0]
    assert report["verdict"]["verdict"] == "forgotten", out
    assert request["audited"]["rows"] == rows
    assert not {"relearn", "benign", "direct"} - set(request["attacks"])
    membership = request["attacks"]["membership"]
    assert not membership["power"]["has_power"]
    assert "was not judged" in report["verdict"]["sentence"]
    facts = {True: "no attack got it back", False: "no attack got "}[apart]
    assert facts in report["verdict"]["sentence"]
    report, _ = audited(nudged_dir, chosen, "--attacks", "direct")
    assert report["verdict"]["verdict"] == "not forgotten"
