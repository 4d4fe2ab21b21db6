"""From a dataclass to a command line and a YAML file, through tyro.

YAML keys and presets become arguments that stand before the user's own, so there is one typed
definition, one parser and one order: defaults < preset < YAML < flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import os
import re
import stat
import sys
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from expunge.cli.help import HELP, Option, all_options, help_of
from expunge.errors import InputError, near

Command = TypeVar("Command")
_LONGEST_NAME = 255
_FREE_TEXT = ("--subject", "--by", "--columns")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Printed:
    """How a command prints what it found."""

    json: bool = False
    """Print JSON instead of tables and sentences."""


GONE = {
    ("sweep", "--write-best"): "run expunge run --config OUT/best.yaml",
    ("sweep", "--oracle"): "run expunge compare with --oracle",
    ("sweep", "--timeout"): "run timeout 2h expunge sweep, and the same again to go on",
    ("view", "--compare"): "run expunge compare",
    ("view", "--oracle-scores"): "run expunge report",
    ("view", "--scores"): "run expunge report",
    ("view", "--audit"): "run expunge report",
    ("view", "--records"): "leave it out, and ask both models for a row",
    ("report", "--layers"): "run expunge analyze layers",
    ("analyze layers", "--layers"): "run expunge sweep --sampler grid with --search",
    ("analyze influence", "--figure"): "leave it out; influence.json holds every figure",
    ("analyze influence", "--labels"): "leave it out; labels are the rows' tokens",
}
"""By command and option that it had once what does the same now."""


def print_json(values: Any) -> None:
    """Prints what a command found for other programs."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def parse(
    command: type[Command],
    arguments: Sequence[str],
    prog: str,
    positional: str = "model",
    recalls: Collection[str] = (),
    more: Sequence[Option] = (),
    defaults: Mapping[str, str] = types.MappingProxyType({}),
) -> Command:
    """Parses `arguments`; words before the first option are the values of `--<positional>`.

    `--config FILE` adds a YAML file's fields. Of options that neither gives, those among `recalls` are
    what the run directory that `positional` names was made of. `more` and `defaults` are for the help.
    Raises InputError with one line for what does not fit; exits for --help and --help-all.
    """
    import tyro

    if {*HELP} & {*arguments}:
        everything = "--help-all" in arguments
        known = {name.replace("_", "-"): f"as {positional.upper()} records" for name in recalls}
        told = {**defaults, **known}
        sys.stdout.write(help_of(command, positional, more, told, everything=everything))
        raise SystemExit(0)
    arguments, config = take_option(arguments, "--config")
    check_words([*arguments, *([] if config is None else ["--config", config])])
    _check_gone(arguments, prog)
    arguments = named(arguments, positional)
    fields = {} if config is None else yaml_fields(Path(config))
    if recalls:
        named_ones = given(arguments, fields)
        missing = {name for name in recalls if not named_ones & {name, *old_names(command, name)}}
        place = take_option(arguments, f"--{positional}")[1] or fields.get(positional)
        fields = {**(_recalled(place, missing) if place else {}), **fields}
    if fields:
        arguments = [*as_arguments(fields, str(config), command), *arguments]
    arguments = [re.sub("^(--.+=)?null$", r"\1None", word) for word in _with_template(arguments)]
    check_words(arguments)
    _check_required(command, arguments, positional)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            parsed = tyro.cli(command, args=arguments, prog=prog)
    except SystemExit:
        raise InputError(_one_line(captured.getvalue(), prog)) from None
    _check_numbers(parsed)
    return parsed


def _check_gone(arguments: Sequence[str], prog: str) -> None:
    """Raises InputError for an option that the command had once, with what does the same now."""
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")
        if mend := GONE.get((prog.removeprefix("expunge "), name)):
            raise InputError(f"{name}: is gone; {mend}")


def _check_required(command: type[Any], arguments: Sequence[str], positional: str) -> None:
    """Raises InputError for the first required option that is missing, or misspelt."""
    options = [option for _, option in all_options(command)]
    words = [word.partition("=")[0].replace("_", "-") for word in arguments]
    known = {name for option in options for name in (option.name, *option.aliases)}
    for option in options:
        if option.default != "required" or {option.name, *option.aliases} & {*words}:
            continue
        strange = [word for word in words if word.startswith("--") and word not in known]
        if meant := difflib.get_close_matches(option.name, strange, n=1):
            raise InputError(f"{meant[0]}: unknown; did you mean {option.name}?")
        name = positional.upper() if option.name == f"--{positional}" else option.name
        about = re.split(r"(?<=[.])\s", option.about)[0].rstrip(".")
        raise InputError(f"{name}: is missing; give {about[:1].lower()}{about[1:]}")


def _with_template(arguments: Sequence[str]) -> list[str]:
    """`--chat-template` alone stands for on and `--no-chat-template` for off, as YAML's false does."""
    found = []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        name = argument.replace("_", "-")
        if name == "--no-chat-template":
            found += ["--chat-template", "off"]
        else:
            alone = name == "--chat-template" and following.startswith("-")
            found += [argument, "on"] if alone else [argument]
    return found


def given(arguments: Sequence[str], fields: Mapping[str, Any]) -> set[str]:
    """The options that arguments and fields of a YAML file name, as fields of the dataclass."""
    words = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
    names = {name.replace("-", "_") for name in (*words, *fields)}
    return names | {re.sub(r"(^|\.)no_", r"\1", name) for name in names}


def old_names(command: type[Any], name: str) -> list[str]:
    """What a field's option was called before."""
    option = "--" + name.replace("_", "-")
    return [a.lstrip("-") for _, o in all_options(command) if o.name == option for a in o.aliases]


def _recalled(place: str, missing: Collection[str]) -> Mapping[str, Any]:
    from expunge.runs.sources import recalled

    return recalled(Path(place), missing)


def _check_numbers(parsed: Any) -> None:
    """Raises InputError for an option that is nan or infinite."""
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        if dataclasses.is_dataclass(value):
            _check_numbers(value)
        elif isinstance(value, float) and not math.isfinite(value):
            option = field.name.replace("_", "-")
            raise InputError(f"--{option} {value}: must be a finite number")


def check_words(arguments: Sequence[str]) -> None:
    """Raises InputError for words that no option takes: empty ones, and names of no file system.

    An empty word is a shell's variable that was not set; as a path it would be this directory. A device
    such as /dev/zero has no end.
    """
    option = "the first word"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = name
            if not equals:
                continue
        else:
            value = argument
        if not value.strip() and option != "--joiner":
            raise InputError(f"{option}: is empty; give a value, or leave the option out")
        longest = max(len(part.encode(errors="replace")) for part in value.split("/"))
        if longest > _LONGEST_NAME and option not in _FREE_TEXT:
            raise InputError(
                f"{option}: has a name of {longest} bytes, more than a file system takes; shorten it"
            )
        if option not in _FREE_TEXT and _is_endless(value):
            raise InputError(f"{option}: {value} is a device that never ends; name a file")


def _is_endless(value: str) -> bool:
    try:
        found = Path(value).stat()
    except (OSError, ValueError):
        return False
    is_memory = stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) == 1  # zero, full, random
    return is_memory and found.st_rdev != Path(os.devnull).stat().st_rdev


def named(arguments: Sequence[str], positional: str) -> list[str]:
    """Writes the words before the first option as the values of an option.

    Raises InputError where that option is given as well.
    """
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    option, rest = f"--{positional}", list(arguments[count:])
    if not count:
        return rest
    if any(argument.partition("=")[0] == option for argument in rest):
        raise InputError(f"{option}: is given twice, {arguments[0]} stands for it; leave one out")
    return [option, *arguments[:count], *rest]


def take_option(arguments: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """Takes `--option VALUE` or `--option=VALUE` out; the last one counts."""
    rest: list[str] = []
    value: str | None = None
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == option:
            if position + 1 == len(arguments):
                raise InputError(f"{option}: needs a value; write {option} VALUE")
            value = arguments[position + 1]
            position += 1
        elif argument.startswith(option + "="):
            value = argument.removeprefix(option + "=")
        else:
            rest.append(argument)
        position += 1
    return rest, value


def yaml_fields(path: Path) -> dict[str, Any]:
    """The file's fields with dotted names. Raises InputError for what is no YAML mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, of which YAML would keep the last in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            _check_once(keys, f"{path} line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    # As written: the option has its type. YAML reads 1:30 as 90 and 010 as 8.
    for kind in ("int", "float", "timestamp"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", lambda _, node: node.value)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file; name a file of options") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path}: is not UTF-8; convert the file") from None
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; name a file of options") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"--config {path}{line}: is not YAML; write name: value on a line") from None
    except (RecursionError, ValueError):
        raise InputError(
            f"--config {path}: is nested too deeply, or holds an odd value; simplify it"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: is not a mapping of options to values; write name: value")
    try:
        pairs = list(_flat(values))
    except RecursionError:  # an alias to what holds it
        raise InputError(f"--config {path}: refers to itself; write the values out") from None
    pairs = [("method" if name == "method.name" else name, value) for name, value in pairs]
    _check_once([name for name, _ in pairs], str(path))
    return dict(pairs)


def _check_once(names: Sequence[str], place: str) -> None:
    """Raises InputError for a name that is there twice, with dashes or underscores."""
    plain = [name.replace("-", "_") for name in names]
    if twice := [name for name, same in zip(names, plain, strict=True) if plain.count(same) > 1]:
        raise InputError(f"--config {place}: has {twice[0]!r} twice; leave one out")


def as_arguments(fields: Mapping[str, Any], source: str, command: type[Any]) -> list[str]:
    """Fields of a YAML file or a preset as arguments, to stand before the user's own.

    Raises InputError for a key that is no option, with the nearest name.
    """
    known = option_names(command)
    arguments = []
    for name, value in fields.items():
        key = name.replace("-", "_")
        if key not in known:
            mend = near(repr(key), map(repr, known), "see --help for the names")
            raise InputError(f"{source}: unknown key {name!r}; {mend}")
        arguments += _as_argument(key.replace("_", "-"), value)
    return arguments


def option_names(command: type[Any]) -> set[str]:
    """Every option of a command by its dotted YAML names, old ones too."""
    options = [option for _, option in all_options(command)]
    names = [name for option in options for name in (option.name, *option.aliases)]
    return {name.lstrip("-").replace("-", "_") for name in names}


def _as_argument(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        group, _, leaf = name.rpartition(".")
        prefix = f"{group}." if group else ""
        return [f"--{prefix}{leaf}" if value else f"--{prefix}no-{leaf}"]
    if value is None:
        return [f"--{name}", "None"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one_line(message: str, prog: str) -> str:
    """tyro's boxed message as one line: what is wrong and what is near, without the help's text."""
    # Where standard output is not UTF-8 the box is of plain characters.
    lines = [line.strip("│╭╮╰╯─|+ \t") for line in message.splitlines()]
    text = " ".join(line for line in lines if line.strip("- "))
    text = re.split(r"For full helptext", text)[0]
    text = re.sub(r"^(Unrecognized options|Value error|Invalid choice) ", "", text)
    text = re.sub(r"^Missing argument .*'(--\S+)'.*", r"\1: needs a value", text)
    near = re.search(r"Perhaps you meant: (--[\w.-]+)", text)
    text = re.split(r"Perhaps you meant|Argument helptext|Got errors", text)[0].strip()
    text = _of_type(text)
    mend = f"did you mean {near[1]}?" if near else f"see {prog} --help"
    return f"{text.rstrip(' .')}; {mend}"


def _of_type(text: str) -> str:
    """tyro's words for a value of a wrong type in words of the command line; others as they are."""
    kinds = {"int": "a whole number", "float": "a number"}
    if plain := re.match(
        r"Error parsing (--\S+): (?:invalid literal for (int)\(\).*|could not convert string to"
        r" (float)): ('.*')$",
        text,
    ):
        return f"{plain[1]} {plain[4]}: takes {kinds[plain[2] or plain[3]]}"
    if not (
        union := re.match(
            r"Error parsing (--\S+): no type matching (.*) could be instantiated from \[(.*)\]",
            text,
        )
    ):
        return text
    taken = []
    for kind in union[2].split("|"):
        if choices := re.fullmatch(r"\{(.*)\}", kind):
            taken += re.split(r",\s*", choices[1])
        else:
            taken.append(kinds.get(kind.lower(), kind))
    taken = ["null" if kind == "None" else kind for kind in taken]
    return f"{union[1]} {union[3]}: takes {' or '.join(sorted(taken, key='null'.__eq__))}"
