"""No command deletes, replaces or loses what it reads, what is not its own, or what it has measured."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from expunge.evaluation import measuring
from expunge.evaluation.scorecard import Scorecard

Cli = Callable[..., tuple[int, str, str]]
CARD = Scorecard(
    forget={"Task1": {"regurgitation": 0.25, "knowledge": None}},
    retain={},
    task_aggregate=None,
    mia_auc=None,
    mia_score=None,
    utility=None,
    final_score=None,
    records=({"id": "a", "split": "forget", "task": "t", "kind": "sc", "score": 1, "generated": "x"},),
)


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def earlier(model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A run directory as a run leaves it."""
    out = tmp_path / "out"
    shutil.copytree(model_dir("olmo"), out)
    names = {path.name: "" for path in out.iterdir()}
    (out / "expunge.json").write_text(json.dumps({"output_sha256": names}))
    return out


def refused(run_cli: Cli, *arguments: object) -> str:
    code, out, err = run_cli(*arguments)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    return err


def test_a_run_does_not_replace_what_it_reads(
    earlier: Path, row_files: dict[str, Path], run_cli: Cli, forget_rows: list[dict[str, str]]
) -> None:
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    said = refused(run_cli, "run", earlier, *rows, "--output", earlier, "--overwrite")
    assert "what --model reads" in said
    write_jsonl(earlier / "rows.jsonl", forget_rows)
    before = content(earlier)
    own = ("--forget", earlier / "rows.jsonl", "--retain", row_files["retain"])
    said = refused(run_cli, "run", earlier, *own, "--output", earlier, "--overwrite")
    assert "holds rows.jsonl, which this command does not write" in said
    sweep = ("--search", "learning_rate=log:1e-4:1e-2", "--trials", 1, "--overwrite")
    (earlier / "sweep.json").touch()
    said = refused(run_cli, "sweep", earlier, *rows, "--output", earlier, *sweep)
    assert "what --model reads" in said
    (earlier / "sweep.json").unlink()
    assert content(earlier) == before


def test_a_sweep_deletes_only_what_a_sweep_wrote(
    model_dir: Callable[[str], Path], row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    out.mkdir()
    for name in ("sweep.json", "thesis.txt"):
        (out / name).write_text("{}")
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    sweep = ("--search", "learning_rate=log:1e-4:1e-2", "--trials", 1, "--overwrite")
    said = refused(run_cli, "sweep", model_dir("olmo"), *rows, "--output", out, *sweep)
    assert "which this command does not write" in said
    assert set(content(out)) == {out / name for name in ("sweep.json", "thesis.txt")}
    (out / "thesis.txt").unlink()
    (out / "best").mkdir()  # of an earlier version's --write-best: a model, which nobody may miss
    said = refused(run_cli, "sweep", model_dir("olmo"), *rows, "--output", out, *sweep)
    assert "holds best, which this command does not write and would delete; move it elsewhere" in said


def test_files_of_others_are_not_replaced_and_places_are_proved_first(
    model_dir: Callable[[str], Path], row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    thesis = tmp_path / "thesis.json"
    thesis.write_text('{"mine": true}')
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    evaluate = ("evaluate", model_dir("olmo"), *rows)
    audit = ("audit", model_dir("olmo"), "--original", model_dir("llama"), *rows)
    influence = ("analyze", "influence", model_dir("olmo"), *rows)
    for command, option in (
        (evaluate, "--output"),
        (evaluate, "--records"),
        (audit, "--output"),
        (influence, "--output"),
    ):
        said = refused(run_cli, *command, option, thesis)
        assert f"{option} {thesis}: is there, and not written by this option" in said
        said = refused(run_cli, *command, option, "/proc/scores.json")
        assert "/proc cannot be written to" in said
    assert thesis.read_text() == '{"mine": true}'


def test_what_was_measured_is_kept_and_revealed_to_its_owner(
    model_dir: Callable[[str], Path],
    row_files: dict[str, Path],
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores, records = tmp_path / "scores.json", tmp_path / "records.jsonl"
    files = ("--output", scores, "--records", records)
    evaluate = ("evaluate", model_dir("olmo"), "--forget", row_files["forget"], *files, "--quiet")

    def measured(*_: Any, **__: Any) -> Scorecard:
        return CARD

    monkeypatch.setattr(measuring, "evaluate_model", measured)
    assert run_cli(*evaluate)[0] == 0
    assert "generated" not in records.read_text()
    assert json.loads(scores.read_text())["model"] == model_dir("olmo").name
    assert run_cli(*evaluate, "--reveal")[0] == 0  # what it wrote itself it replaces
    assert "generated" in records.read_text()
    assert records.stat().st_mode & 0o777 == 0o600

    def meanwhile(*_: Any, **__: Any) -> Scorecard:
        scores.unlink()
        scores.mkdir()
        return CARD

    monkeypatch.setattr(measuring, "evaluate_model", meanwhile)
    code, _, err = run_cli(*evaluate)
    assert code == 1
    assert err.count("\n") == 1
    (kept,) = tmp_path.glob("scores-*.json")
    assert f"Is a directory; what was to be written is in {kept}" in err
    assert json.loads(kept.read_text())["forget"] == CARD.forget


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device; make"),
        (OSError(errno.EFBIG, "File too large", "x"), "x: File too large; raise the limit"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; lower"),
        (MemoryError("secret"), "out of memory; lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; lower"),
    ],
)
def test_what_a_machine_has_too_little_of_is_no_internal_error(
    fault: Exception,
    said: str,
    model_dir: Callable[[str], Path],
    row_files: dict[str, Path],
    run_cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(measuring, "check_model", fail)
    code, _, err = run_cli("evaluate", model_dir("olmo"), "--forget", row_files["forget"])
    assert code == 1
    assert err.startswith(f"expunge: {said}")
    assert "secret" not in err
