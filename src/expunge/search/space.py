"""The search space: which options a sweep varies, and between which values.

One dimension a word, `name=kind:...`:

    method.alpha=log:5:100        a number, even on a logarithmic scale
    method.beta=float:1:8         a number, even; float:1:8:0.5 in steps of 0.5
    method.layer=int:2:5          a whole number, both ends included; int:8:64:8 in steps of 8
    schedule=choice:constant,cosine

Each is checked against the type of the option's own definition, and the settings are constructed with
every end of it, so that a sweep does not find out at its tenth trial.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from expunge.errors import InputError, near
from expunge.methods.base import Method
from expunge.models.decoder import DecoderLayout
from expunge.training.options import TrainingOptions

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = bool | int | float | str | None
Kind = Literal["log", "float", "int", "choice"]
_KINDS: tuple[Kind, ...] = ("log", "float", "int", "choice")
METHOD_PREFIX = "method."
_MOST = 2**63 - 1
"""Optuna takes no larger whole numbers."""
_SAME_MEASURE = "it changes how rows become text, so that trials could not be compared"
_SAME_RESULT = "it changes time and memory, not the result"
_FIXED = {
    "chat_template": _SAME_MEASURE,
    "long_rows": _SAME_MEASURE,
    "micro_batch_size": _SAME_RESULT,
    "save_every": _SAME_RESULT,
    "unknown_rows": "it says whether a run begins, not what comes of it",
}
"""Options that a sweep takes, but does not vary."""


@dataclass(frozen=True)
class Dimension:
    """One option that is varied."""

    name: str
    """Dotted, as in YAML: `learning_rate`, `method.alpha`."""
    kind: Kind
    low: float = math.nan
    high: float = math.nan
    step: float | None = None
    choices: tuple[Value, ...] = ()
    is_whole: bool = False
    """Whether its values are whole numbers."""

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Both ends, or every choice."""
        if self.kind == "choice":
            return self.choices
        return (int(self.low), int(self.high)) if self.is_whole else (self.low, self.high)

    @property
    def points(self) -> tuple[Value, ...]:
        """Every value, if they can be counted. Raises InputError for others."""
        if self.kind == "choice":
            return self.choices
        if self.kind == "log" or not (self.is_whole or self.step):
            raise InputError(
                f"--sampler grid: {self.name} has no steps; write {self.name}=float:LOW:HIGH:STEP or"
                f" {self.name}=choice:A,B"
            )
        step = self.step or 1
        count = round((self.high - self.low) / step) + 1
        values = [self.low + step * number for number in range(count)]
        return tuple(map(int, values)) if self.is_whole else tuple(values)

    def to_json(self) -> dict[str, Any]:
        """What is stored of it."""
        if self.kind == "choice":
            return {"kind": self.kind, "choices": list(self.choices)}
        return {"kind": self.kind, "low": self.low, "high": self.high, "step": self.step}

    def suggest(self, trial: Trial) -> Value:
        """The trial's value."""
        if self.kind == "choice":
            chosen: Value = trial.suggest_categorical(self.name, self.choices)
            return chosen
        log = self.kind == "log"
        if self.is_whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.name, low, high, step=step, log=log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=log)


@dataclass(frozen=True)
class Space:
    """What is varied, over what stays: a method's settings and a run's options."""

    dimensions: tuple[Dimension, ...]
    method: Method
    options: TrainingOptions

    def with_values(self, values: Mapping[str, Value]) -> tuple[Method, TrainingOptions]:
        """The settings of one trial. Raises InputError for values that do not go together."""
        method: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for name, value in values.items():
            if name.startswith(METHOD_PREFIX):
                method[name.removeprefix(METHOD_PREFIX)] = value
            else:
                options[name] = value
        return replaced(self.method, method), dataclasses.replace(self.options, **options)

    def grid(self) -> list[dict[str, Value]]:
        """All combinations; the last dimension varies first."""
        names = [dimension.name for dimension in self.dimensions]
        points = itertools.product(*(dimension.points for dimension in self.dimensions))
        return [dict(zip(names, values, strict=True)) for values in points]

    def check(self, layout: DecoderLayout | None = None) -> None:
        """Constructs the settings with every end of every dimension.

        With a layout each is also checked against the model. Raises InputError that names the
        dimension.
        """
        for dimension in self.dimensions:
            for value in dimension.extremes:
                try:
                    method, _ = self.with_values({dimension.name: value})
                    if layout is not None:
                        method.check(layout)
                except InputError as error:
                    raise _refusal(dimension.name, str(error)) from None

    def to_json(self) -> dict[str, Any]:
        """What is stored of it, by name."""
        return {dimension.name: dimension.to_json() for dimension in self.dimensions}


def replaced(method: Method, values: Mapping[str, Any]) -> Method:
    """A method's settings with some of them changed. Raises InputError as the method does."""
    changed: Method = dataclasses.replace(typing.cast("Any", method), **values)
    return changed


def read_space(words: Sequence[str], method: Method, options: TrainingOptions) -> Space:
    """Reads one dimension a word. Raises InputError that names the word, what is wrong and the mend."""
    if not words:
        raise InputError(
            "--search: nothing to vary; give for example --search learning_rate=log:1e-4:1e-2"
        )
    known = dict(searchable(type(method)))
    dimensions = tuple(_dimension(word, known, method) for word in words)
    names = [dimension.name for dimension in dimensions]
    for name in names:
        if names.count(name) > 1:
            raise _refusal(name, "is given twice; give one range")
    space = Space(dimensions, method, options)
    space.check()
    return space


def searchable(method: type[Any]) -> Iterator[tuple[str, Any]]:
    """Every option of a run and of the method by its dotted name, with its type."""
    for definition, prefix in ((TrainingOptions, ""), (method, METHOD_PREFIX)):
        hints = typing.get_type_hints(definition)
        for field in dataclasses.fields(definition):
            yield f"{prefix}{field.name}", hints[field.name]


def _refusal(what: str, why: str) -> InputError:
    return InputError(f"--search {what}: {why}")


def _dimension(word: str, known: Mapping[str, Any], method: Method) -> Dimension:
    name, equals, text = word.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        example = f"{name}=log:1e-4:1e-2, {name}=int:2:5 or {name}=choice:A,B"
        raise _refusal(word, f"has no range; write for example {example}")
    if name not in known:
        mend = near(name, known, "see expunge run --help for the options")
        raise _refusal(name, f"{method.name} has no such option; {mend}")
    if name in _FIXED:
        raise _refusal(name, f"{_FIXED[name]}; give it once, as an option")
    given, _, rest = text.strip().partition(":")
    kind = next((kind for kind in _KINDS if kind == given), None)
    if kind is None:
        mend = near(given, _KINDS, "write log:, float:, int: or choice:")
        raise _refusal(word, f"unknown kind {given!r}; {mend}")
    plain, optional = _plain_type(known[name])
    if kind == "choice":
        return Dimension(name, kind, choices=_choices(word, name, rest, plain, optional))
    return _range(word, name, kind, rest, plain)


def _plain_type(hint: Any) -> tuple[Any, bool]:
    """The type without None, and whether None is allowed."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        inner = [part for part in parts if part is not type(None)]
        numbers = [part for part in inner if part in (int, float)]
        if numbers and all(part in numbers or typing.get_origin(part) is Literal for part in inner):
            inner = numbers  # a number or a word that stands for one, such as auto
        return (inner[0] if len(inner) == 1 else hint), len(inner) < len(parts)
    return hint, False


def _range(word: str, name: str, kind: Kind, text: str, plain: Any) -> Dimension:
    if plain not in (int, float):
        example = _example(plain)
        mend = f"write {name}=choice:{example}" if example else "leave it out"
        raise _refusal(word, f"{name} is no number; {mend}")
    if plain is float and kind == "int":
        mend = f"write {name}=float:LOW:HIGH, with a third number for steps"
        raise _refusal(word, f"{name} is a decimal number; {mend}")
    if plain is int and kind == "float":
        raise _refusal(word, f"{name} is a whole number; write {name}=int:LOW:HIGH")
    parts = text.split(":")
    if len(parts) not in ((2,) if kind == "log" else (2, 3)):
        steps = "" if kind == "log" else f" or {name}={kind}:LOW:HIGH:STEP"
        raise _refusal(word, f"write {name}={kind}:LOW:HIGH{steps}")
    low, high, *steps_of = (_number(word, part, plain) for part in parts)
    step = steps_of[0] if steps_of else None
    if not low < high:
        raise _refusal(word, f"{low:g} is not below {high:g}; write {name}={kind}:LOW:HIGH")
    if kind == "log" and low <= 0:
        raise _refusal(word, "a logarithmic range lies above 0; raise its low end")
    if step is not None:
        if not 0 < step <= high - low:
            raise _refusal(word, f"the step {step:g} must be above 0 and at most {high - low:g}")
        # Optuna lowers an end that no step meets, with a warning that nobody reads.
        high = low + step * math.floor((high - low) / step + 1e-9)
    return Dimension(name, kind, low, high, step, is_whole=plain is int)


def _number(word: str, text: str, plain: Any) -> float | int:
    try:
        value: float | int = plain(text)
    except ValueError:
        what = "whole number" if plain is int else "number"
        raise _refusal(word, f"{text!r} is no {what}; give one") from None
    if plain is int and abs(value) > _MOST:
        raise _refusal(word, f"{text} is beyond 2^63; give a number nearer 0")
    if plain is float and not math.isfinite(value):
        raise _refusal(word, f"{text} is not finite; give a number")
    return value


def _choices(word: str, name: str, text: str, plain: Any, optional: bool) -> tuple[Value, ...]:
    if not _example(plain) and plain not in (int, float):
        varied = "numbers, switches and named choices"
        raise _refusal(word, f"{name} is text or a list; a sweep varies {varied}")
    values = tuple(_choice(word, name, each.strip(), plain, optional) for each in text.split(","))
    different = len(set(map(repr, values)))
    if different < len(values):
        raise _refusal(word, "names a choice twice; name each once")
    if different < 2:
        raise _refusal(word, f"needs two choices or more; write {name}=choice:A,B")
    return values


def _choice(word: str, name: str, text: str, plain: Any, optional: bool) -> Value:
    if text.lower() in ("null", "none"):
        if not optional:
            raise _refusal(word, f"{name} cannot be null; leave it out")
        return None
    if plain is bool:
        if text.lower() not in ("true", "false"):
            raise _refusal(word, f"{text!r} is no switch; write choice:true,false")
        return text.lower() == "true"
    if typing.get_origin(plain) is Literal:
        if text not in typing.get_args(plain):
            raise _refusal(word, f"{text!r} is none of {_example(plain)}")
        return text
    return _number(word, text, plain)


def _example(plain: Any) -> str:
    """Every choice of an option that has few; empty for others."""
    if plain is bool:
        return "true,false"
    if typing.get_origin(plain) is Literal:
        return ",".join(map(str, typing.get_args(plain)))
    return ""
