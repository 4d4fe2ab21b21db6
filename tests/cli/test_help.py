"""What --help says: everyday options under headings on one page, every option with --help-all."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import site_commands
from expunge.cli import help as helping
from expunge.methods.catalog import METHODS

Cli = Callable[..., tuple[int, str, str]]
COMMANDS = {each.prog.removeprefix("expunge "): each for each in site_commands.commands()}
SPOKEN = ("run", "erase", "audit", "evaluate", "plan", "sweep")


@pytest.fixture(autouse=True)
def _of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_the_everyday_options_of_a_run_take_60_lines(run_cli: Cli) -> None:
    code, out, err = run_cli("run", "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    headings = [line.split(":")[0] for line in lines if re.match(r"[a-z ]+:$", line)]
    assert headings == ["rows", "model", "method", "when to stop", "memory"]


def test_the_defaults_are_those_of_the_method(run_cli: Cli) -> None:
    said = " ".join(run_cli("run", "--help", "--method", "libu-published")[1].split())
    defaults = METHODS["libu-published"].defaults
    assert f"(default: {defaults.epochs})" in said
    assert f"(default: {defaults.batch_size})" in said
    assert f"(default: {defaults.learning_rate:g} x 256 / hidden size" in said
    assert "None" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named_and_described(name: str, run_cli: Cli) -> None:
    command = COMMANDS[name]
    options = [*command.options, *command.of_run, *command.of_methods.get(command.method, ())]
    for word in ("--help", "--help-all"):
        code, out, _ = run_cli(*name.split(), word)
        assert code == 0
        assert out.startswith(f"usage: expunge {name}")
        words = set(re.findall(r"--[\w.-]+|(?m:^  [A-Z]+)", out))
        missing = {option.name for option in options} - words
        assert {f"  {option[2:].upper()}" for option in missing} <= words
    shown = "".join(out.split())
    # A default stands where it reads "null".
    texts = [re.split("[Nn]ull", option.about)[0] for option in options]
    assert all("".join(text.split()) in shown for text in texts)


@pytest.mark.parametrize("name", SPOKEN)
def test_examples_end_the_help_and_name_options_that_there_are(name: str, run_cli: Cli) -> None:
    examples = run_cli(name, "--help")[1].partition("\nExamples:\n")[2]
    assert examples.count(f"  expunge {name} ") == 3
    for each in re.split(r"\n(?=  expunge)", examples):
        method = re.search(r"--method (\S+)", each)
        accepted = COMMANDS[name].accepts(method[1] if method else None)
        assert set(re.findall(r"--[\w.-]+", each)) <= accepted


def test_headings_are_of_options_that_there_are() -> None:
    named = {name for names in helping._GROUPS.values() for name in names.split()}
    known = {option.removeprefix("--") for each in COMMANDS.values() for option in each.accepts()}
    assert named <= known


def test_the_page_answers_to_its_old_name(run_cli: Cli) -> None:
    assert run_cli("serve", "--help") == run_cli("view", "--help")
