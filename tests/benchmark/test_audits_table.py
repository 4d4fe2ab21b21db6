"""benchmarks/audits.py: its table, and that nothing is audited twice."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("audits")


def extraction(target: float, oracle: float, recovered: float, power: bool = True) -> dict[str, Any]:
    return {
        "kind": "extraction",
        "power": {"has_power": power},
        "recovered": {"value": recovered},
        "models": {
            "target": {"extracted": {"value": target}},
            "unlearned": {"extracted": {"value": 0.5}},
            "oracle": {"extracted": {"value": oracle}},
        },
    }


def membership(target: float, unlearned: tuple[float, float]) -> dict[str, Any]:
    def of(*areas: float) -> dict[str, Any]:
        return {"variants": {str(i): {"auc": {"value": area}} for i, area in enumerate(areas)}}

    return {
        "kind": "membership",
        "power": {"has_power": True},
        "recovered": None,
        "models": {"target": of(target, 0.5), "unlearned": of(*unlearned), "oracle": of(0.45, 0.5)},
    }


def audit(verdict: str, **attacks: Any) -> dict[str, Any]:
    request = {
        "verdict": {"verdict": verdict},
        "attacks": attacks,
        "audited": {"rows": 4},
        "forget": {"rows": 9},
    }
    return {"requests": [request], "settings": {"budget": {"name": "quick"}}}


def test_each_cell_is_that_of_the_audit(audits: Any) -> None:
    found = {
        "one": audit(
            "partly forgotten",
            relearn=extraction(1.0, 0.2, 0.31),
            membership=membership(1, (0.6, 0.1)),
        ),
        "two": audit("forgotten", relearn=extraction(0.8, 0.0, 0.9, power=False)),
    }
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in audits.table(found).splitlines()
    ]
    header, _, target, oracle, one, two = lines
    assert header[0] == "model"
    assert header[-1] == "verdict"
    relearn, member = header.index("relearn"), header.index("membership")
    assert (target[relearn], oracle[relearn]) == ("0.90", "0.10")  # the mean over both audits
    assert (target[member], oracle[member]) == ("1.00", "0.45")
    assert (one[relearn], one[member], one[-1]) == ("0.31", "0.10", "partly forgotten")
    assert (two[relearn], two[member], two[-1]) == ("-", "-", "forgotten")


def test_a_section_is_replaced_and_nothing_else(audits: Any) -> None:
    page = "a\n<!-- audits x: begin -->\nold\n<!-- audits x: end -->\nb\n"
    done = audits.replaced(page, "audits x", "new")
    assert done == "a\n<!-- audits x: begin -->\n\nnew\n<!-- audits x: end -->\nb\n"
    with pytest.raises(SystemExit, match="needs one line"):
        audits.replaced(page, "audits y", "new")


def test_what_was_audited_is_not_audited_again(
    audits: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, output = tmp_path / "runs", tmp_path / "out"
    for name in ("one", "two"):
        (runs / name).mkdir(parents=True)
        (runs / name / "expunge.json").write_text("{}")
    output.mkdir()
    (output / "one.json").write_text(json.dumps(audit("forgotten", relearn=extraction(1, 0, 0))))
    (output / "one.seconds").write_text('{"seconds": 7.0}')
    asked = []

    def fake(run: Path, _material: Any, file: Path, _budget: str) -> None:
        asked.append(run.name)
        file.write_text(json.dumps(audit("destroyed", relearn=extraction(1, 0, 1))))
        file.with_suffix(".seconds").write_text('{"seconds": 9.0}')

    monkeypatch.setattr(audits, "audited", fake)
    command = ["audits.py", str(runs), "--material", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    audits.main()
    out = capsys.readouterr().out
    assert asked == ["two"]
    assert "one 7, two 9" in out
    assert "4 of 9 forget rows, budget quick" in out
