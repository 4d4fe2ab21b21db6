"""`expunge report` on a real run of a tiny model: run, evaluate, audit, report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_run import parsed, words

from expunge.audits import auditing, budgets, inputs
from expunge.audits.budgets import Budget
from expunge.reporting import report as writing
from expunge.reporting.grids import at

Cli = Callable[..., tuple[int, str, str]]
SMALL = Budget(
    facts=None, retain=8, nonmembers=None, tokens=24, steps=6, measures=2, tuning_rows=4, folds=2,
    samples=3, layers=2, resamples=50, rates=(1.0, 3.0),
)  # fmt: skip


def test_a_run_from_unlearning_to_its_report(
    run_cli: Cli,
    memorised_dir: Path,
    oracle_dir: Path,
    row_files: dict[str, Path],
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
    nonmember_rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (auditing, inputs, budgets):
        monkeypatch.setattr(module, "BUDGETS", {"quick": SMALL})
    out = tmp_path / "out"
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    never = ("--nonmembers", row_files["nonmembers"])
    code, _, err = run_cli(
        *("run", memorised_dir, *rows, *never, "--output", out, "--method", "gradient-difference"),
        *("--epochs", 3, "--learning-rate", 1e-3, "--select", "last", "--quiet"),
    )
    assert code == 0, err
    for model, path in ((out, out / "scores.json"), (memorised_dir, tmp_path / "before.json"),
                        (oracle_dir, tmp_path / "oracle.json")):  # fmt: skip
        assert run_cli("evaluate", model, *rows, *never, "--output", path, "--quiet")[0] == 0
    code, _, err = run_cli(
        *("audit", out, "--original", memorised_dir, "--oracle", oracle_dir, *rows, *never),
        *(
            "--attacks",
            "direct,verbatim,membership,trigger,relearn",
            "--output",
            out / "audit.json",
        ),
        *("--reveal", "--quiet"),
    )
    assert code == 0, err
    code, printed, err = run_cli(
        *("report", out, "--scores", tmp_path / "before.json", out / "scores.json"),
        *("--oracle-scores", tmp_path / "oracle.json", "--forget", row_files["forget"]),
        *("--retain", row_files["retain"], "--requested", "2026-11-02"),
    )
    assert (code, err) == (0, "")
    data = json.loads((out / "report.json").read_text())
    page = parsed((out / "report.html").read_text())
    numbers = list(page.iter("data"))
    assert len(numbers) > 100
    for each in numbers:
        assert float(each.attrib["value"]) == at(data, each.attrib["data-at"])
    manifest = json.loads((out / "expunge.json").read_text())
    audited = json.loads((out / "audit.json").read_text())
    assert data["asked"]["forget"]["documents"] == 4
    assert data["asked"]["retain"]["documents"] == 4
    assert data["done"]["finished"] == manifest["finished"]
    assert data["done"]["finished_from"] == "expunge.json"
    assert data["summary"]["title"] in printed
    assert data["audit"]["verdict"] == audited["verdict"]
    assert len(data["weights"]["tensors"]) == len(manifest["changed_tensors"])
    steps = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
    terms = [line["forget"] for line in steps if "forget" in line]
    assert [value for _, value in data["training"]["curve"]["forget"]["drawn"]] == terms
    for sentence in (attack["sentence"] for attack in audited["requests"][0]["attacks"].values()):
        assert sentence in words(page)
    jsonschema = pytest.importorskip("jsonschema", reason="is in the extra dev")
    schema = Path(writing.__file__).with_name("report.schema.json")
    jsonschema.validate(data, json.loads(schema.read_text()))
    # The audit was made with --reveal, the report was not: it holds no word of any row.
    every = forget_rows + retain_rows + nonmember_rows
    texts = [row[column] for row in every for column in ("input", "output")]
    texts += [word for row in every for word in re.findall(r"90\d-\S+", row["output"])]
    assert any(text in (out / "audit.json").read_text() for text in texts)
    for name in ("report.html", "report.json", "README.md"):
        told = (out / name).read_text()
        assert [text for text in texts if text in told] == []
    assert [text for text in texts if text in printed] == []
    # The checkpoint still loads, and its record still fits its files.
    assert run_cli("report", out, "--quiet")[0] == 0
    assert json.loads((out / "report.json").read_text())["record"]["changed_files"] == []
