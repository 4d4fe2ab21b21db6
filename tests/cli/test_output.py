"""Standard output that is narrow or gone, and what a command says when memory is short."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import write_jsonl
from expunge.cli.main import COMMANDS, main

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_what_the_terminal_cannot_show_is_shown_by_number(
    encoding: str,
    form: tuple[str, ...],
    model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"id": "Жé1", "input": "Where does Ada live?", "output": "In Żagań."}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row])
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    command = ["data", "inspect", str(rows), "--model", str(model_dir()), "--row", row["id"]]
    assert main([*command, "--reveal", *form]) == 0
    text = shown.getvalue().decode(encoding)
    assert "\\u0416" in text
    if form:
        assert row["id"] in json.dumps(json.loads(text), ensure_ascii=False)


def test_a_reader_that_has_left_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["run", "--help"]) == 141
    assert capsys.readouterr().err == ""


def test_output_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["run", "--help"], ["--version"]):
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert main(command) == 1
        said = capsys.readouterr().err
        assert (said.count("\n"), said.count("No space left on device")) == (1, 1)


def test_what_was_written_before_the_output_failed_stands(
    run_cli: Cli,
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ledger = ("--ledger", str(tmp_path / "ledger.db"))
    for command in (["add", str(row_files["forget"]), *ledger], ["list", *ledger]):
        with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main(["requests", *command]) == 1
        assert capsys.readouterr().err == (
            "expunge: standard output: No space left on device; write it elsewhere; what the command"
            " wrote to files stands\n"
        )
    _, out, _ = run_cli("requests", "list", *ledger, "--json")
    assert len(json.loads(out)) == 1


class OutOfMemoryError(Exception):
    """As torch's."""


@pytest.mark.parametrize(
    ("error", "said"), [(BrokenPipeError, "internal error"), (OutOfMemoryError, "out of memory")]
)
def test_a_pipe_of_something_else_is_an_error(
    error: type[Exception], said: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("expunge.cli.compare.main", fail)
    code, _, err = run_cli("compare", "a")
    assert code == 1
    assert said in err


@pytest.mark.parametrize(
    "command",
    [
        *(
            "demo",
            "erase",
            "run",
            "sweep",
            "evaluate",
            "audit",
            "view",
            "benchmark build",
            "compare",
            "report",
        ),
        *(
            "analyze layers",
            "analyze influence",
            "requests serve",
            "requests verify",
            "requests add",
        ),
    ],
)
def test_short_memory_names_options_that_the_command_has(
    command: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise OutOfMemoryError

    _, usage, _ = run_cli(*command.split(), "--help")
    monkeypatch.setattr(f"{COMMANDS[command.split()[0]][0]}.main", fail)
    _, _, err = run_cli(*command.split())
    assert err.startswith("expunge: out of memory; ")
    assert all(option in usage for option in re.findall(r"--[a-z-]+", err))
