"""`expunge erase`: from rows to a report in one command, killed and resumed; what is known later."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CHATML, none_in, write_jsonl
from expunge.audits import auditing, budgets, inputs
from expunge.audits.budgets import Budget
from expunge.cli import audit as audit_command
from expunge.cli import erase
from expunge.cli import evaluate as evaluate_command
from expunge.cli.main import main
from expunge.evaluation import generation
from expunge.runs import planning
from expunge.runs.sources import remembered

Cli = Callable[..., tuple[int, str, str]]
PHASES = ("run", "measure", "measure", "audit", "write_report")
SMALL = Budget(
    facts=2, retain=2, nonmembers=4, tokens=12, steps=1, measures=1, tuning_rows=2, folds=2, samples=1,
    layers=1, resamples=20,
)  # fmt: skip


class Killed(Exception):
    """What ends a phase here."""


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    memorised_dir: Path,
    row_files: dict[str, Path],
) -> dict[str, Any]:
    """One erasure that was killed at the beginning of each of its phases, and resumed each time."""
    directory = tmp_path_factory.mktemp("erased")
    target = Path(shutil.copytree(memorised_dir, directory / "target"))
    files = {name: Path(shutil.copy(path, directory)) for name, path in row_files.items()}
    output = directory / "OUT"
    words = ["erase", str(target), "--output", str(output), "--method", "gradient-difference"]
    words += ["--epochs", "2", "--learning-rate", "3e-3", "--subject", "case 17", "--resume"]
    for name, path in files.items():
        words += [f"--{name}", str(path)]
    done: Counter[str] = Counter()
    left = [*PHASES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setattr(generation, "MAX_NEW_TOKENS", 12)
        for module in (auditing, inputs, budgets):
            patch.setattr(module, "BUDGETS", {"quick": SMALL})

        def killed_at_first(name: str) -> Callable[..., Any]:
            phase = getattr(erase, name)

            def call(*given: Any, **more: Any) -> Any:
                if left and left[0] == name:
                    raise Killed(left.pop(0))
                done[name] += 1
                return phase(*given, **more)

            return call

        for name in set(PHASES):
            patch.setattr(erase, name, killed_at_first(name))
        codes = [main(words) for _ in range(len(PHASES) + 1)]
    return {
        "codes": codes, "done": done, "words": words, "output": output, "target": target, **files,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


def test_killed_in_each_phase_it_goes_on_and_repeats_nothing(made: dict[str, Any]) -> None:
    assert made["codes"] == [1, 1, 1, 1, 1, 0]
    # A complete run is returned as it is; scores of two models, one audit.
    assert made["done"] == {"run": 5, "measure": 2, "audit": 1, "write_report": 1}
    files = {path.name for path in made["output"].iterdir()}
    assert files >= {"expunge.json", "before.json", "scores.json", "audit.json", "report.html"}
    report = json.loads((made["output"] / "report.json").read_text())
    assert [column["role"] for column in report["scorecard"]["columns"]] == ["target", "unlearned"]
    assert report["asked"]["subject"] == "case 17"
    assert report["summary"]["audited"]
    assert report["audit"]["requests"][0]["rows"] == 8


def test_it_ends_with_five_lines_and_says_what_it_understood(made: dict[str, Any], run_cli: Cli) -> None:
    code, out, err = run_cli(*made["words"])
    assert code == 0, err
    lines = [line.strip("│ ") for line in out.splitlines() if line.startswith("│")]
    for line, begins in zip(lines, ("verdict", "came back", "cost", "report", "next"), strict=True):
        assert line.startswith(begins)
    assert str(made["output"] / "report.html") in lines[3]
    assert "2.0 passes; " in lines[2]
    assert "forget: 8 rows of 4 documents (4 questions, 4 continuations)" in err
    assert "plan: gradient-difference" in err
    assert "1 of 4: unlearning" in err
    assert "2 of 4" not in err  # it is done


def test_what_leaves_the_machine_names_no_path_and_no_text(
    made: dict[str, Any], forget_rows: list[dict[str, str]], secret_file: Path
) -> None:
    texts = [row[column] for row in forget_rows for column in ("input", "output")]
    none_in([*texts, str(made["target"].parent)], made["output"])
    kept = list((secret_file.parent / "runs").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
    assert remembered(made["output"])["sources"]["original"]["path"] == str(made["target"])


def test_another_erasure_is_not_resumed(made: dict[str, Any], run_cli: Cli) -> None:
    code, _, err = run_cli(*made["words"], "--epochs", "3")
    assert code == 2
    assert "was made with another training.epochs; give the same" in err
    code, _, err = run_cli(*[word for word in made["words"] if word != "--resume"])
    assert (code, "exists; choose another" in err) == (2, True)


@pytest.fixture
def asked_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `audit` and `evaluate` were asked, in the place of their work."""
    found: list[Any] = []

    def take(given: Any, *_: Any) -> Any:
        found.append(given)
        raise Killed

    monkeypatch.setattr(audit_command, "audit", take)
    monkeypatch.setattr(evaluate_command, "measure", take)
    return found


def test_later_commands_take_from_the_run_what_it_knows(
    made: dict[str, Any], asked_of: list[Any], run_cli: Cli, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(made["output"], tmp_path / "moved"))
    run_cli("audit", moved)
    run_cli("evaluate", moved)
    audited, measured = asked_of
    assert audited.original == str(made["target"])
    for given in (audited, measured):
        sources = [getattr(given, name) for name in ("forget", "retain", "nonmembers")]
        assert sources == [str(made[name]) for name in ("forget", "retain", "nonmembers")]
        assert (given.joiner, given.long_rows) == (" ", "refuse")
    code, out, _ = run_cli("report", moved)
    assert code == 0
    assert "the target's scorecard" not in out
    assert json.loads((moved / "report.json").read_text())["asked"]["subject"] == "case 17"


def test_what_is_given_wins_and_what_is_gone_or_changed_is_named(
    made: dict[str, Any], asked_of: list[Any], run_cli: Cli, tmp_path: Path
) -> None:
    other = Path(shutil.copy(made["nonmembers"], tmp_path / "other.jsonl"))
    changed, gone = made["nonmembers"], made["retain"]
    texts = [path.read_text() for path in (changed, gone)]
    try:
        changed.write_text(texts[0] + "\n")
        gone.unlink()
        for option, path, told in (("--nonmembers", changed, "is not as it was"),
                                   ("--retain", gone, "is no more")):  # fmt: skip
            given = {"--nonmembers": other, "--retain": other}
            given.pop(option)
            code, _, err = run_cli("audit", made["output"], *next(iter(given.items())))
            assert code == 2
            assert f"{option}: {path} {told} since {made['output']} was made of it; give" in err
        run_cli("audit", made["output"], "--nonmembers", other, "--retain", other)
        assert (asked_of[0].nonmembers, asked_of[0].retain) == (str(other), str(other))
        # Rows belong together: who gives the forget set gives the others.
        run_cli("evaluate", made["output"], "--forget", other)
        assert (asked_of[1].retain, asked_of[1].nonmembers) == (None, None)
        # A run of elsewhere is known by no path.
        (tmp_path / "OUT").mkdir()
        assert remembered(tmp_path / "OUT") == {}
    finally:
        for path, text in zip((changed, gone), texts, strict=True):
            path.write_text(text)


def test_a_dry_run_plans_and_writes_nothing(
    memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    command = ("erase", memorised_dir, *rows, "--output", tmp_path / "OUT")
    code, out, err = run_cli(*command, "--dry-run")
    assert (code, err) == (0, "")
    assert "plan: spectral" in out
    assert "together" in out
    assert list(tmp_path.iterdir()) == []


def test_the_form_of_the_rows_is_said_as_far_as_it_is_known(
    memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    chat = shutil.copytree(memorised_dir, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(CHATML)
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    command = ("erase", chat, *rows, "--output", tmp_path / "OUT", "--dry-run")
    for options, told in (((), "measured when the run starts"), (("--no-chat-template",), "off")):
        code, out, err = run_cli(*command, *options)
        assert (code, err) == (0, "")
        assert f"chat template: {told}\n" in out


def test_what_does_not_fit_is_done_by_what_plan_proposes_or_refused(
    memorised_dir: Path,
    row_files: dict[str, Path],
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    command = ("erase", memorised_dir, *rows, "--output", tmp_path / "OUT", "--dry-run")
    monkeypatch.setattr(planning, "_process_bytes", lambda: 0)
    plan = run_cli("plan", memorised_dir, *rows, "--json", "--on", "1KB", "--device", "cpu")[1]
    others = json.loads(plan)["alternatives"]
    least = min(other["peak_bytes"] for other in others)
    fitting = [other["options"] for other in others if other["peak_bytes"] == least]
    monkeypatch.setattr(planning, "machine_memory", lambda: least)
    code, out, err = run_cli(*command, "--device", "cpu")
    assert code == 0, err
    told = re.search("taken, as the run does not fit otherwise: (.*)", out)
    assert told is not None
    assert told[1] in fitting
    monkeypatch.setattr(planning, "machine_memory", lambda: least - 1)
    code, out, err = run_cli(*command, "--device", "cpu")
    assert (code, out) == (2, "")
    assert "neither does what plan proposes" in err


def test_what_scores_and_audit_would_refuse_is_refused_at_first(
    memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    rows = ("--forget", row_files["forget"], "--output", tmp_path / "OUT", "--quiet")
    retain = ("--retain", row_files["retain"])
    paraphrases = write_jsonl(tmp_path / "p.jsonl", [{"of": "none", "input": "x", "output": "y"}])
    for given, told in (
        ((), "--retain: is missing"),
        ((*retain, "--mmlu", tmp_path), "holds no test/"),
        ((*retain, "--nonmembers", row_files["forget"]), "forget"),
        ((*retain, "--oracle", tmp_path / "none"), "none"),
        ((*retain, "--paraphrases", paraphrases), "p.jsonl"),
        ((*retain, "--subject", " "), "--subject"),
    ):
        code, _, err = run_cli("erase", memorised_dir, *rows, *given)
        assert (code, err.count("\n")) == (2, 1)
        assert told in err
    assert not (tmp_path / "OUT").exists()
