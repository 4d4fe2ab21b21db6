"""The options of every command, as Markdown, from the dataclasses that the command line is made of.

Each command is asked for its help with a recorder in the place of what writes it, so that what is
described here is what would have been parsed. The site's hook fills docs/commands.md with it, and tests
check by it what the documentation says of options.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from expunge.cli.help import Option, options_of
from expunge.terminal import shown

OF_ALL = (
    Option("--config", "file", "null", "Read options from YAML; the command line overrides them."),
    Option("--quiet", "flag", "off", "Show no progress."),
    Option("--help-all", "flag", "off", "Describe every option; `--help` describes the everyday ones."),
    Option("--debug", "flag", "off", "Show tracebacks, which may quote rows."),
)


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
        everywhere: set[str] = set()
        options = [*OF_ALL, *self.options, *self.of_run]
        options += self.of_methods.get(method or self.method, ())
        for option in options:
            everywhere.update((option.name, *option.aliases))
            if option.takes == "flag":
                head, dot, leaf = option.name.removeprefix("--").rpartition(".")
                everywhere.add(f"--{head}{dot}no-{leaf}")
        return everywhere


class _Recorded(BaseException):
    """Carries what a command would have explained past the handlers of the command line."""

    def __init__(self, command: type[Any], more: Sequence[Option]) -> None:
        super().__init__(command.__name__)
        self.command, self.more = command, more
        self.about = inspect.cleandoc(command.__doc__ or "")
        self.prog = re.match(r"expunge(?: [a-z][a-z-]*)+", self.about)[0]  # type: ignore[index]


def _record(command: type[Any], _: str, more: Sequence[Option], *__: object, **___: object) -> NoReturn:
    raise _Recorded(command, more)


def _recorded(main: Callable[[list[str]], object], arguments: list[str]) -> _Recorded:
    with mock.patch("expunge.cli.options.help_of", _record):
        try:
            main(arguments)
        except _Recorded as found:
            return found
    raise RuntimeError(f"{arguments}: explains nothing; describe it in {__file__}")


@cache
def commands() -> tuple[Described, ...]:
    """Every command and subcommand, in the order of `expunge --help`."""
    from expunge.cli.main import COMMANDS

    found = []
    for module_name, _ in COMMANDS.values():
        module = import_module(module_name)
        firsts = [[sub] for sub in getattr(module, "SUBCOMMANDS", {})] or [[]]
        found += [_described(module.main, first) for first in firsts]
    return tuple(found)


def _described(main: Callable[[list[str]], object], first: list[str]) -> Described:
    from expunge.methods.catalog import METHODS

    record = _recorded(main, [*first, "--help"])
    if not record.more:
        return Described(record.prog, record.about, tuple(options_of(record.command)))
    hints = typing.get_type_hints(record.command)
    return Described(
        record.prog,
        record.about,
        (*options_of(hints["inputs"]), *record.more),
        tuple(options_of(hints["training"])),
        {name: tuple(options_of(method, "method.")) for name, method in METHODS.items()},
        hints["settings"].name,
    )


def command_of(words: Sequence[str]) -> Described | None:
    """The command that these words, `expunge` the first of them, call."""
    fitting = [c for c in commands() if list(words[: len(c.prog.split())]) == c.prog.split()]
    return max(fitting, key=lambda command: len(command.prog), default=None)


def markdown() -> str:
    """The body of the page of commands."""
    parts = [
        "## For every command",
        _table(OF_ALL),
    ]
    runs = None
    for command in commands():
        parts += [f"## {command.prog}", _about(command.about)]
        parts.append(_table(command.options))
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
    """A command's help: usage and examples as code, the rest as text."""
    usage, *rest = text.split("\n\n")
    examples = [rest.pop()] if rest and rest[-1].startswith("Examples:") else []
    code = [f"```text\n{block}\n```" for block in (usage, *map(_examples, examples))]
    return "\n\n".join([code[0], " ".join(" ".join(rest).split()), *code[1:]])


def _examples(block: str) -> str:
    return textwrap.dedent(block.partition("\n")[2])


def _table(options: Sequence[Option]) -> str:
    lines = ["| option | takes | default | |", "|---|---|---|---|"]
    for option in options:
        rows = [(f"`{option.name}`", option.takes, option.default, option.about)]
        for alias in option.aliases:
            said = f"The same as `{option.name}`, by its old name."
            rows.append((f"`{alias}`", option.takes, "null", said))
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    sys.stdout.write(markdown())
