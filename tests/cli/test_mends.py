"""What a command says names options that it has: a mend that works there.

A message may come from deep below a command. So each command's code is followed from its main function
through every name that it mentions, and each text in it that names an option is looked at.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

import expunge
from expunge.cli.analyze import SUBCOMMANDS as ANALYSES
from expunge.cli.main import COMMANDS
from expunge.cli.requests import SUBCOMMANDS
from expunge.methods.catalog import METHODS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import site_commands  # noqa: E402
from prose import below, texts  # noqa: E402

SOURCE = Path(expunge.__file__).parent
Place = tuple[str, str]
"""A module and a name in it."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9._-]*[a-z0-9]")
ELSEWHERE = re.compile(r"expunge ((?:requests|analyze|data|benchmark) [a-z-]+|[a-z]+)")
MEND = re.compile(r"; |must be|: needs |: excludes |: (choose|name|load|give|takes) |go on with ")
UNFINISHED = ("no size", "{} holds {} where names with values belong")
"""What is caught and said with more."""
NEVER = {
    (
        "expunge.audits.attacks.depth",
        "not_alike",
    ): "a plan names no attack, and tells of none why it is not run",
    ("expunge.audits.inputs", "AuditInputs"): "evidence of a ledger reveals nothing",
    ("expunge.audits.inputs", "checked_models"): "an erasure's models are of one run",
    ("expunge.data.columns", "_missing"): "OtherColumns.plain is what they say",
    ("expunge.data.columns", "_check_unused"): "OtherColumns.plain is what they say",
    ("expunge.data.tokenization", "encode_rows"): "the page reads rows in windows",
    ("expunge.evaluation.multiple_choice", "_told_apart"): "the page asks no questions",
    ("expunge.evaluation.multiple_choice", "read_questions"): "an erasure asks without examples",
    ("expunge.evaluation.multiple_choice", "check_prompts"): "the page asks no questions",
    ("expunge.models.decoder", "DecoderLayout"): "methods ask for an MLP output",
    (
        "expunge.reporting.content",
        "_not_measured",
    ): "the command that they are of is put in before them",
    ("expunge.reporting.material", "_check_weights"): "an erasure's scores are its own",
    ("expunge.runs.keeping", "plain_errors"): "a sweep says itself how its last run goes on",
    ("expunge.runs.scratch", "_check_same"): "a sweep overwrites its last run",
    ("expunge.runs.scratch", "scratch_beside"): "a sweep overwrites its last run",
}
"""Where a command that lacks the option does not come, or says otherwise, and why."""


_OF_METHODS = ("expunge.maths.fisher", "expunge.models.lora")


@cache
def definitions() -> dict[Place, ast.AST]:
    """Every function, class and value of the package's modules."""
    found: dict[Place, ast.AST] = {}
    for path in SOURCE.rglob("*.py"):
        module = ".".join(["expunge", *path.relative_to(SOURCE).with_suffix("").parts])
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[module, node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                found |= {(module, name): node.value for name in names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {(module, a.asname or a.name): node for a in node.names}
    return found


def code(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it."""
    yield node
    for each in below(node):
        yield from code(each)


def reached(start: Place) -> set[Place]:
    """Everything that code mentions, and what that mentions in turn."""
    seen: set[Place] = set()
    waiting = [start]
    while waiting:
        place = waiting.pop()
        if place not in seen and place in definitions():
            seen.add(place)
            waiting += mentioned(place)
    return seen


@cache
def mentioned(place: Place) -> Sequence[Place]:
    """The names that a definition mentions, where they are defined."""
    module, node = place[0], definitions()[place]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "", a.name) for a in node.names if place[1] in (a.name, a.asname)]
    every = list(code(node))
    local = {
        alias.asname or alias.name: (each.module or "", alias.name)
        for each in every
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    names = (each.id for each in every if isinstance(each, ast.Name))
    return [local.get(name, (module, name)) for name in names]


@cache
def texts_of(place: Place) -> Sequence[str]:
    """What is written in a definition."""
    return list(texts(definitions()[place]))


@cache
def accepted() -> Mapping[str, frozenset[str]]:
    """Every option by command."""
    return {
        each.prog.removeprefix("expunge "): frozenset({"--help"}).union(*map(each.accepts, METHODS))
        for each in site_commands.commands()
    }


def strangers(text: str, command: str) -> list[str]:
    """Options in a text that the command lacks, or the one that the same clause names before.

    What begins with an option is about a value that was given for it; of one that a command lacks
    there is none.
    """
    found: list[str] = []
    for clause in re.split(r"(?<![.])[;.] ", text):
        parts = ELSEWHERE.split(clause)
        for owner, part in zip([command, *parts[1::2]], parts[::2], strict=True):
            has = accepted().get(owner, accepted()[command])
            named = [option.replace("_", "-") for option in OPTION.findall(part)]
            found += [option for option in named if option not in has]
    subject = OPTION.match(text)
    about = subject is not None and subject[0].replace("_", "-") not in accepted()[command]
    return [] if about else found


def entry(command: str) -> Place:
    """Where a command begins."""
    first, _, sub = command.partition(" ")
    module = COMMANDS[first][0]
    if first == "requests":
        return module, SUBCOMMANDS[sub][0].__name__
    return (ANALYSES[sub][0] if first == "analyze" else module), "main"


def is_of_methods(place: Place, command: str) -> bool:
    """Whether code runs in a method's run only, which the command has none of."""
    inside = place[0].startswith("expunge.methods.") or place[0] in _OF_METHODS
    return inside and "--method" not in accepted()[command]


# The demo's rows, models and settings are its own: only what it shares with runs by name can fail.
@pytest.mark.parametrize("command", [name for name in accepted() if name != "demo"])
def test_a_command_names_options_that_it_has(command: str) -> None:
    wrong = [
        f"{place[0]} {place[1]}: {', '.join(found)}: {' '.join(text.split())[:200]}"
        for place in sorted(reached(entry(command)))
        if place not in NEVER and place[1] != "_ABOUT" and not is_of_methods(place, command)
        for text in texts_of(place)
        if " " in text and "<html" not in text and (found := strangers(text, command))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_demo_has_what_its_runs_name() -> None:
    assert accepted()["demo"].issuperset(("--output", "--overwrite", "--resume", "--device"))


def test_the_check_finds_what_it_should() -> None:
    below = reached(entry("audit"))
    assert ("expunge.data.tokenization", "_windows") in below
    assert ("expunge.training.muon", "Muon") not in below
    assert set(NEVER) <= set(definitions())
    assert strangers("x: give --long-rows window", "report") == ["--long-rows"]
    assert strangers("x: give --long-rows window", "audit") == []
    assert strangers("x: make it with expunge evaluate --records", "compare") == []
    assert strangers("x: see expunge evaluate; give --records", "compare") == ["--records"]
    assert strangers("--mmlu: leave it out, or give --mmlu-shots", "compare") == []
    (text,) = texts(ast.parse('f"--{x}: is" f" {y}"'))
    assert text == "--{}: is {}"


def refusals() -> Iterator[tuple[str, str]]:
    """Place and text of every refusal whose message stands where it is raised."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") in ("InputError", "RefusedRun")
                and isinstance(node.args[0], ast.JoinedStr | ast.Constant)
            ):
                yield f"{path.name}:{node.lineno}", next(texts(node.args[0]))


def test_every_refusal_has_a_mend() -> None:
    bare = [
        f"{place}: {text}"
        for place, text in refusals()
        # One whose end is put in has it there.
        if not MEND.search(text) and not text.endswith("{}") and text not in UNFINISHED
    ]
    assert not bare, "\n".join(bare)
