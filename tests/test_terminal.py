"""Text from outside that would steer a terminal is shown there, whatever prints it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from expunge.cli.console import progress_on_stderr
from expunge.terminal import native_lines_dropped, plain, plain_console, plain_streams, quiet

Cli = Callable[..., tuple[int, str, str]]
HOSTILE = "a\x1b]0;x\x07\x1b[2J\x9b31m\r\u202eb\x7f\x00"
SHOWN = r"a\u001b]0;x\u0007\u001b[2J\u009b31m\u000d\u202eb\u007f\u0000"
RAW = set(HOSTILE) - set(SHOWN)


def test_what_a_terminal_obeys_is_written_out() -> None:
    assert plain(HOSTILE) == SHOWN
    assert plain("é漢\tא\n") == "é漢\tא\n"


def test_rich_draws_its_own_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    console = plain_console(force_terminal=True, color_system="standard")
    console.print(f"{HOSTILE} [bold]:cat:", style="red")
    assert capsys.readouterr().out == f"\x1b[31m{SHOWN} [bold]:cat:\x1b[0m\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_bars_on_a_terminal_and_lines_elsewhere(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" * terminal)
    with plain_streams(), progress_on_stderr() as progress:
        progress.phase("a part", 0, 2)
        progress.message("said between")
        for _ in range(2):
            progress.phase("a part", 2, 2)
    out, err = capsys.readouterr()
    assert (out, "\\u001b" in err) == ("", False)
    if terminal:
        assert "\x1b[" in err
    else:
        assert err == "said between\na part: done in 0 s\n"


def test_a_command_leaves_its_caller_as_it_was(run_cli: Cli, tmp_path: Path) -> None:
    ended_by = signal.getsignal(signal.SIGTERM)
    assert run_cli("report", tmp_path / "none", "--quiet")[0] == 2
    assert not quiet.get()
    assert signal.getsignal(signal.SIGTERM) is ended_by


@pytest.fixture
def hostile(tmp_path: Path, forget_rows: list[dict[str, str]]) -> Path:
    rows = [{**row, "id": f"{HOSTILE}{n}", "task": HOSTILE} for n, row in enumerate(forget_rows)]
    return write_jsonl(tmp_path / "forget.jsonl", rows)


def test_no_command_sends_it_on(
    run_cli: Cli, hostile: Path, model_dir: Any, place: Any, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    model, ledger = model_dir("olmo"), place.ledger
    subject = HOSTILE.replace("\x00", "")
    card = {"forget": {HOSTILE: {"regurgitation": 0.5, "knowledge": 0.5}}, "retain": {}}
    scores = tmp_path / "scores.json"
    totals = ("task_aggregate", "mia_auc", "mia_score", "utility", "final_score")
    scores.write_text(json.dumps(card | dict.fromkeys(totals)))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    save_file({HOSTILE: torch.zeros(1, dtype=torch.uint16)}, broken / "model.safetensors")
    commands: list[list[object]] = [
        ["requests", "add", hostile, "--ledger", ledger, "--subject", subject],
        ["requests", "list", "--ledger", ledger],
        ["requests", "list", "--ledger", ledger, "--json"],
        ["requests", "show", 1, "--ledger", ledger],
        ["requests", "verify-bundle", subject],
        ["data", "inspect", hostile, "--model", model, "--row", f"{HOSTILE}0"],
        ["data", "inspect", hostile, "--model", model, "--row", "x"],
        ["data", "inspect", hostile, "--model", model, "--json", "--row", f"{HOSTILE}0"],
        ["evaluate", subject, "--forget", hostile],
        ["evaluate", broken, "--forget", hostile],
        ["compare", scores],
        ["compare", scores, "--json"],
        [HOSTILE],
    ]
    told = []
    for command in commands:
        code, out, err = run_cli(*command)
        assert RAW.isdisjoint(out + err), command
        told.append((code, out + err))
        if "--json" in command:
            assert plain(HOSTILE[:8]) in out
            json.loads(out)
    assert [code for code, _ in told] == [0, 0, 0, 0, 2, 0, 2, 0, 2, 2, 0, 0, 2]


def test_standard_error_is_back_whatever_threads_do_without_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def drop(_: int) -> None:
        with native_lines_dropped(), native_lines_dropped():
            os.write(2, b"dropped")
            time.sleep(0.001)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(drop, range(40)))
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
