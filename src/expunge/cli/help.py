"""What --help says: a command's options under headings, with their defaults, and examples.

The options are collected from the dataclass that the command line is made of. Everyday ones are
described by their first sentence; --help-all describes all of them in full.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Union

from expunge.terminal import shown

HELP = ("-h", "--help", "--help-all")
_GROUPS = {
    "rows": (
        "forget retain calibration nonmembers score-nonmembers paraphrases mmlu harness real-authors"
        " world-facts oracle-scores forget-questions forget-solved retain-questions retain-solved"
        " columns chat-template"
    ),
    "model": "model original base oracle output overwrite resume dtype device",
    "when to stop": "epochs max-steps time-limit select",
    "memory": "micro-batch-size cache-limit",
    "expert": (
        "joiner long-rows unknown-rows members benign earlier mmlu-shots harness-include"
        " trust-remote-code schedule max-grad-norm validation-fraction validate-every save-every"
        " cache-dtype influence retain-sampling risk-factor skip-gone trackers keep-adapter study"
        " study-name sampler prune max-failures cache tuning damping"
        " damping-unit"
    ),
}
"""Headings by the options under them; another option stands with those of its command or method."""
_PARTS = {"": "options", "inputs": "options", "training": "method", "settings": "method options"}
"""The heading of such an option, by the part of a run's command that it is of."""
_ORDER = (
    "rows", "model", "options", "method", "when to stop", "memory", "method options", "expert",
)  # fmt: skip
_COLUMN = 24
_WIDEST = 100


@dataclass(frozen=True)
class Option:
    """One option as help and reference show it."""

    name: str
    """With its dashes, such as --method.layer."""
    takes: str
    """In words; `flag` for one that takes nothing."""
    default: str
    about: str
    aliases: tuple[str, ...] = ()
    """Its old names."""


def help_of(
    command: type[Any],
    positional: str,
    more: Sequence[Option] = (),
    defaults: Mapping[str, str] = types.MappingProxyType({}),
    *,
    everything: bool = False,
) -> str:
    """The help of a command: the usage of its docstring, the text, its options, examples.

    `more` are options of its method that are no fields; `defaults` by name stand in the place of null.
    """
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    usage, *texts = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    examples = [texts.pop()] if texts and texts[-1].startswith("Examples:") else []
    lines = [f"usage: {usage}", *(textwrap.fill(" ".join(text.split()), width) for text in texts)]
    groups = _grouped(command, more, defaults)
    for heading, options in groups.items():
        if everything or heading not in ("expert", "method options"):
            told = [_described(o, positional, width, everything=everything) for o in options]
            lines.append("\n".join([f"{heading}:", *told]))
            continue
        named = [
            o.name if heading == "expert" else f"{o.name}\N{NO-BREAK SPACE}{o.default}" for o in options
        ]
        text = textwrap.fill(", ".join(named), width - 2, break_on_hyphens=False)
        lines.append(f"{heading} (--help-all describes them):\n{textwrap.indent(text, '  ')}")
    text = "\n\n".join([*lines, *examples]) + "\n"
    return text.replace("\N{NO-BREAK SPACE}", " ")


def _grouped(
    command: type[Any], more: Sequence[Option], defaults: Mapping[str, str]
) -> dict[str, list[Option]]:
    """The options by heading, in the order of the help."""
    place = {name: heading for heading, names in _GROUPS.items() for name in names.split()}
    order = list(place)
    found: dict[str, list[Option]] = {heading: [] for heading in _ORDER}
    found["method"] += more
    for part, option in all_options(command):
        name = option.name.removeprefix("--")
        if option.default in ("null", "required") and name in defaults:
            option = dataclasses.replace(option, default=defaults[name])
        found[place.get(name, _PARTS[part])].append(option)
    for heading in _GROUPS:
        found[heading].sort(key=lambda option: order.index(option.name.removeprefix("--")))
    return {heading: options for heading, options in found.items() if options}


def _described(option: Option, positional: str, width: int, *, everything: bool) -> str:
    """An option's name and what it says, in two columns."""
    name = option.name
    if option.takes == "flag":
        head, dot, leaf = name.removeprefix("--").rpartition(".")
        name += f", --{head}{dot}no-{leaf}" * (option.default == "on")
    else:
        letter = re.split("[-.]", name)[-1][0].upper()
        name += " " + {"whole number": "N", "number": "X"}.get(option.takes, letter)
        if option.takes.endswith("..."):
            name += " ..."
    if option.name == f"--{positional}":
        name = positional.upper()
    about = option.about.replace("null: ", "default: ").replace("Null: ", "Default: ")
    if not everything:
        about = re.split(r"(?<=[.])\s+(?=[A-Z`])", about)[0]
    facts = [] if "`" not in option.takes else [option.takes.replace("`", "").removesuffix(" ...")]
    if option.default == "required":
        facts.append(option.default)
    elif option.default not in ("null", "none", *(["off"] if option.takes == "flag" else [])):
        facts.append(f"default: {option.default}")
    if facts:
        about += f" ({'; '.join(facts)})"
    margin = " " * _COLUMN
    text = textwrap.fill(
        about, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )
    first = f"  {name}".ljust(_COLUMN)
    return f"{first}{text[_COLUMN:]}" if first[-1] == " " else f"{first}\n{text}"


def all_options(command: type[Any]) -> Iterator[tuple[str, Option]]:
    """The options of a command, each with the part of a run's command that it is of, if any."""
    hints = typing.get_type_hints(command, include_extras=True)
    parts = [name for name, hint in hints.items() if dataclasses.is_dataclass(_plain(hint))]
    for part in parts:
        (name,) = (mark.name for mark in hints[part].__metadata__)
        for option in options_of(_plain(hints[part]), f"{name}." if name else ""):
            yield part, option
    if not parts:
        yield from (("", option) for option in options_of(command))


def _plain(hint: Any) -> Any:
    return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def options_of(command: type[Any], prefix: str = "") -> Iterator[Option]:
    """The options that tyro makes of a dataclass without nested ones."""
    import tyro

    hints = typing.get_type_hints(command)
    marked = typing.get_type_hints(command, include_extras=True)
    docs = _docs(command)
    for field in dataclasses.fields(command):
        marks = getattr(marked[field.name], "__metadata__", ())
        if tyro.conf.Suppress in marks:
            continue
        takes = kind_of(hints[field.name])
        plain = next((mark.name for mark in marks if mark.name is not None), field.name)
        aliases = tuple(alias for mark in marks for alias in mark.aliases or ())
        name = f"--{prefix}{plain}".replace("_", "-")
        yield Option(name, takes, default_of(field), docs.get(field.name, ""), aliases)


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


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default as one would write it."""
    if field.default_factory is not dataclasses.MISSING:
        return shown(field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    return shown(field.default)
