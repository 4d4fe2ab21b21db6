"""From Python: what the commands do with files, and the names of the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import expunge
from expunge.methods.catalog import METHODS


def test_every_method_is_a_name_of_the_package() -> None:
    assert {method.__name__ for method in METHODS.values()} <= set(expunge.__all__)
    assert all(getattr(expunge, method.__name__) is method for method in METHODS.values())


def test_audit_report_and_compare_give_what_their_commands_give(
    run_cli: Callable[..., tuple[int, str, str]],
    memorised_dir: Path,
    row_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    steps = ("--method", "gradient-difference", "--max-steps", 1, "--select", "last")
    assert run_cli("run", memorised_dir, *rows, *steps, "--output", out, "--quiet")[0] == 0
    for model, file in ((memorised_dir, "before.json"), (out, "scores.json")):
        assert run_cli("evaluate", model, *rows, "--output", out / file, "--quiet")[0] == 0

    found = expunge.audit(out, attacks=["direct"], output=out / "audit.json")  # the run knows the rest
    code, printed, _ = run_cli("audit", out, "--attacks", "direct", "--json", "--quiet")
    assert code == 0
    assert found == json.loads((out / "audit.json").read_text()) == json.loads(printed)
    with pytest.raises(expunge.InputError, match=r"original: is missing, and .* give original="):
        expunge.audit(memorised_dir, forget=row_files["forget"])

    reported = expunge.report(out, output=tmp_path / "report", card=False)
    assert reported == json.loads((tmp_path / "report" / "report.json").read_text())
    assert reported["audit"]["verdict"] == found["verdict"]

    cards = expunge.compare(out, original=out / "before.json")
    assert list(cards) == ["target", "out"]
    _, printed, _ = run_cli("compare", out, "--original", out / "before.json", "--json")
    assert {label: card.to_json() for label, card in cards.items()} == json.loads(printed)
    with pytest.raises(expunge.InputError, match="no run given"):
        expunge.compare()
