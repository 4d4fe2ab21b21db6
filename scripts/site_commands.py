"""The options of every command, as Markdown, from the dataclasses that the command line is made of.

Each command is started with tyro's parser exchanged for a recorder, so what is described here is what
would have been parsed. The site's hook fills docs/commands.md with it, and tests check by it what the
documentation says of options.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, Union
from unittest import mock

import tyro

FLAGS = {
    "--quiet": ("flag", "off", "Show no progress."),
    "--json": ("flag", "off", "Print JSON."),
    "--audit": ("flag", "off", "Plan an audit of the result too, at its default budget."),
    "--on": ("GPU or size", "null", "Plan for this GPU, or for so much memory such as 24GB."),
    "--sharded": (
        "number",
        "null",
        "Plan for one of so many processes that share the weights (FSDP2).",
    ),
}
"""Options that a command takes out before its dataclass is filled in."""
OF_ALL = {
    "--config": ("file", "null", "Read options from YAML; the command line overrides them."),
    "--debug": ("flag", "off", "Show tracebacks, which may quote rows."),
}
OF_RUNS = {
    "--method": ("method", "", "The method; it decides which `--method.*` there are."),
    "--preset": ("preset", "null", "Take published settings; other options override them."),
}
"""The default of --method is the command's."""


@dataclass(frozen=True)
class Option:
    """One option as the reference shows it."""

    name: str
    """With its dashes, such as --method.layer."""
    takes: str
    default: str
    about: str


@dataclass(frozen=True)
class Described:
    """One command with everything that can be said to it."""

    prog: str
    """Such as `expunge requests add`."""
    about: str
    options: tuple[Option, ...]
    """Its own."""
    of_run: tuple[Option, ...] = ()
    """Those of the training loop, where it takes the options of `expunge run`."""
    of_methods: Mapping[str, tuple[Option, ...]] = dataclasses.field(default_factory=dict)
    """`--method.*` by method, where it takes them."""
    method: str = ""
    """The method that it takes where none is named."""

    def accepts(self, method: str | None = None) -> set[str]:
        """Every option by name, with the negations of flags."""
        everywhere = {*OF_ALL, *(OF_RUNS if self.of_methods else ())}
        options = [*self.options, *self.of_run, *self.of_methods.get(method or self.method, ())]
        for option in options:
            everywhere.add(option.name)
            if option.takes == "flag":
                head, dot, leaf = option.name.removeprefix("--").rpartition(".")
                everywhere.add(f"--{head}{dot}no-{leaf}")
        return everywhere


class _Recorded(BaseException):
    """Carries what a command would have parsed past the handlers of the command line."""

    def __init__(self, command: type[Any], prog: str, about: str) -> None:
        super().__init__(prog)
        self.command, self.prog, self.about = command, prog, about


def _record(command: type[Any], *, args: object, prog: str, description: str) -> NoReturn:
    del args
    raise _Recorded(command, prog, description)


def _recorded(main: Callable[[list[str]], object], arguments: list[str]) -> _Recorded:
    with mock.patch("tyro.cli", _record):
        try:
            main(arguments)
        except _Recorded as found:
            return found
    raise RuntimeError(f"{arguments}: parses nothing; describe it in {__file__}")


@cache
def commands() -> tuple[Described, ...]:
    """Every command and subcommand, in the order of `expunge --help`."""
    from expunge.cli.main import COMMANDS

    found = []
    for module_name, _ in COMMANDS.values():
        module = import_module(module_name)
        subcommands: Mapping[str, Any] = getattr(module, "SUBCOMMANDS", {})
        for sub, (place, _) in subcommands.items():
            files = [module] + ([import_module(place)] if isinstance(place, str) else [])
            found.append(_described(module.main, [sub], files))
        if not subcommands:
            found.append(_described(module.main, [], [module]))
    return tuple(found)


def _described(
    main: Callable[[list[str]], object], first: list[str], modules: Sequence[types.ModuleType]
) -> Described:
    from expunge.methods.catalog import METHODS

    record = _recorded(main, [*first, "--help"])
    flags = [
        Option(name, *FLAGS[name]) for name in dict.fromkeys(n for m in modules for n in _taken(m))
    ]
    fields = {field.name for field in dataclasses.fields(record.command)}
    if fields != {"inputs", "training", "settings"}:
        own = [*options_of(record.command), *flags]
        return Described(record.prog, record.about, tuple({o.name: o for o in own}.values()))
    hints = typing.get_type_hints(record.command)
    return Described(
        record.prog,
        record.about.split("\n\n--method M is one of")[0],
        (*options_of(hints["inputs"]), *flags),
        tuple(options_of(hints["training"])),
        {name: tuple(options_of(method, "method.")) for name, method in METHODS.items()},
        hints["settings"].name,
    )


def _taken(module: types.ModuleType) -> Iterator[str]:
    """Options that a command's module takes out of the arguments by hand."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("take_flag", "take_option")
            and isinstance(node.args[1], ast.Constant)
            and node.args[1].value not in (*OF_ALL, *OF_RUNS)
        ):
            name = str(node.args[1].value)
            if name not in FLAGS:
                raise RuntimeError(f"{name} of {module.__name__}: describe it in {__file__}, FLAGS")
            yield name


def options_of(command: type[Any], prefix: str = "") -> Iterator[Option]:
    """The options that tyro makes of a dataclass without nested ones."""
    hints = typing.get_type_hints(command)
    marked = typing.get_type_hints(command, include_extras=True)
    docs = _docs(command)
    for field in dataclasses.fields(command):
        takes = kind_of(hints[field.name])
        marks = getattr(marked[field.name], "__metadata__", ())
        if tyro.conf.Suppress in marks:
            continue
        plain = next((mark.name for mark in marks), None) or field.name
        name = f"--{prefix}{plain}".replace("_", "-")
        yield Option(name, takes, default_of(field, takes), docs.get(field.name, ""))
        for alias in (alias for mark in marks for alias in mark.aliases or ()):
            yield Option(alias, takes, "null", f"The same as `{name}`, by its old name.")


def _docs(command: type[Any]) -> dict[str, str]:
    """The line below each field, of base classes too."""
    found: dict[str, str] = {}
    for owner in reversed(command.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for field, below in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def kind_of(hint: Any) -> str:
    """What an option of this type takes, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(kind_of(part) for part in parts if part is not types.NoneType)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (tuple, list):
        return f"{kind_of(parts[0])} ..."
    names = {bool: "flag", int: "whole number", float: "number", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def default_of(field: dataclasses.Field[Any], takes: str) -> str:
    """A field's default as one would write it."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    return shown(value, flag=takes == "flag")


def shown(value: Any, *, flag: bool = False) -> str:
    """A value as one would write it on the command line; null where nothing is set."""
    if flag:
        return "on" if value else "off"
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return str(value)


def command_of(words: Sequence[str]) -> Described | None:
    """The command that these words, `expunge` the first of them, call."""
    fitting = [c for c in commands() if list(words[: len(c.prog.split())]) == c.prog.split()]
    return max(fitting, key=lambda command: len(command.prog), default=None)


def markdown() -> str:
    """The body of the page of commands."""
    parts = [
        "## For every command",
        _table([Option(name, *about) for name, about in OF_ALL.items()]),
    ]
    runs = None
    for command in commands():
        parts += [f"## {command.prog}", _about(command.about)]
        options = list(command.options)
        if command.of_methods:
            options += [
                Option(name, takes, default or command.method, about)
                for name, (takes, default, about) in OF_RUNS.items()
            ]
        parts.append(_table(options))
        if command.of_methods and runs is None:
            runs = command
            parts += ["### Training", _table(command.of_run), *_methods(command)]
        elif command.of_methods:
            parts.append("It takes the [training](#training) options and those of a method, too.")
    return "\n\n".join(parts) + "\n"


def _methods(command: Described) -> Iterator[str]:
    from expunge.methods.catalog import METHODS

    for name, options in command.of_methods.items():
        method: Any = METHODS[name]
        defaults = method.defaults
        yield f"### Options of {name}"
        yield (
            f"Defaults of the run: {defaults.epochs} epochs, batch size {defaults.batch_size},"
            f" learning rate {defaults.learning_rate:g} x 256 / hidden size, {defaults.schedule}."
        )
        yield _table(options)
        for preset_name, preset in method.presets.items():
            fields = {f"method.{key}": value for key, value in preset.method.items()} | preset.run
            words = " ".join(f"--{k.replace('_', '-')} {shown(v)}" for k, v in fields.items())
            yield f"Preset `{preset_name}` ({preset.source}):\n\n```text\n{_wrapped(words)}\n```"


def _wrapped(words: str) -> str:
    return textwrap.fill(words, 88, break_long_words=False, break_on_hyphens=False)


def _about(text: str) -> str:
    """A command's help: the usage lines as code, the rest as text."""
    usage, _, rest = inspect.cleandoc(text).partition("\n\n")
    return f"```text\n{usage}\n```\n\n{' '.join(rest.split())}"


def _table(options: Sequence[Option]) -> str:
    lines = ["| option | takes | default | |", "|---|---|---|---|"]
    for option in options:
        cells = (f"`{option.name}`", option.takes, option.default, option.about)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    sys.stdout.write(markdown())
