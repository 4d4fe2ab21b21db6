"""The tables of a report: each number names its place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from expunge.audits.base import MODELS
from expunge.reporting.tables import measure_name
from expunge.terminal import shown

Column = tuple[str, str, str]
"""Head, place below that of the row, and form: one of a number, or one of `_TOLD`."""
_TOLD: Mapping[str, Callable[[Any], str]] = {
    "text": lambda value: "" if value is None else str(value),
    "path": str,
    "path id": str,
    "list": ", ".join,
    "yes": lambda value: "yes" if value else "no",
    "power": lambda attack: "yes" if attack["has_power"] else f"no: {attack['why_no_power']}",
    "measure": measure_name,
    "note": lambda candidate: ", ".join(
        name for name, is_it in (("kept", "chosen"), ("destroyed", "destroyed")) if candidate[is_it]
    ),
}
_CANDIDATE: Sequence[Column] = (
    ("forget accuracy", "forget_accuracy", "score"), ("retain accuracy", "retain_accuracy", "score"),
    ("forget loss", "forget_loss", "short"), ("retain loss", "retain_loss", "short"),
    ("MIA AUC", "mia_auc", "score"), ("distance", "never_seen_distance", "short"),
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """A table before it is marked up."""

    heads: Sequence[tuple[str, str]]
    """Names, and the class of their cells."""
    lines: Sequence[Sequence[Any]]
    kept: Sequence[int] = ()
    """Which lines are of what was chosen."""


@dataclass(frozen=True)
class Grids:
    """Makes the tables of one report."""

    report: Mapping[str, Any]
    number: Callable[[str, str], Markup]
    """Shows the number at a place in a form."""

    def grid(
        self,
        place: str,
        columns: Sequence[Column],
        kinds: Collection[str] = (),
        most: int | None = None,
    ) -> Grid:
        """The entries of a list of the report, of some kinds alone, `most` at most."""
        every = list(enumerate(at(self.report, place)))[:most]
        entries = [(i, entry) for i, entry in every if not kinds or entry["kind"] in kinds]
        lines = [
            [self._cell(entry, f"{place}/{i}", column) for column in columns] for i, entry in entries
        ]
        kept = [number for number, (_, entry) in enumerate(entries) if entry.get("chosen")]
        return Grid(self._heads(columns), lines, kept)

    def of_models(self, head: str, place: str, form: str) -> list[Column]:
        """A column a model, `*` in the place standing for it."""
        return [(head + model, place.replace("*", model), form) for model in MODELS]

    def scorecard(self) -> Grid:
        """Every measured part, a column a scorecard."""
        labels = [column["role"] for column in self.report["scorecard"]["columns"]]
        values = [(label, f"values/{i}", "score") for i, label in enumerate(labels)]
        columns = [("measure", "", "measure"), ("good is", "good", "text"), *values]
        return self.grid("/scorecard/rows", columns)

    def membership(self, place: str) -> Grid:
        """The AUC of an attack's scores, a line a score."""
        columns = self.of_models("", "*/auc", "score interval")
        columns.append(("found at 1% false alarms, unlearned", "unlearned/tpr", "percent interval"))
        models, lines = at(self.report, f"{place}/models"), []
        for variant in models["unlearned"]["variants"]:
            line = [variant]
            for _, key, form in columns:
                model, figure = key.split("/")
                entry = None if models[model] is None else models[model]["variants"][variant]
                part = f"{place}/models/{model}/variants/{pointer_part(variant)}"
                line.append(self._cell(entry, part, ("", figure, form)))
            lines.append(line)
        return Grid(self._heads([("score", "", "text"), *columns]), lines)

    def terms(self) -> Grid:
        """The course of either term of the loss."""
        keys = ("first", "last", "least", "greatest")
        curve = self.report["training"]["curve"]
        lines = [
            [name, *(self.number(f"/training/curve/{name}/{key}", "short") for key in keys)]
            for name in ("forget", "retain")
            if curve[name]
        ]
        columns = [("term", "", "text"), *((key, key, "short") for key in keys)]
        return Grid(self._heads(columns), lines)

    def candidates(self) -> Grid:
        """What was measured during the run, after the target."""
        columns = [("step", "step", "count"), *_CANDIDATE, ("score", "score", "score")]
        grid = self.grid("/training/candidates", [*columns, ("note", "", "note")])
        if self.report["training"]["target"] is None:
            return grid
        known = [self.number(f"/training/target/{key}", form) for _, key, form in _CANDIDATE]
        return Grid(grid.heads, [["target", *known, "", ""], *grid.lines], [n + 1 for n in grid.kept])

    def costs(self) -> Grid:
        """Time and memory by phase."""
        lines = [
            [prefix + name, self.number(f"/record/{key}/{pointer_part(name)}", form)]
            for key, prefix, form in (
                ("seconds", "", "seconds"), ("peak_memory_bytes", "most memory, ", "bytes"),
            )
            for name in self.report["record"][key]
        ]  # fmt: skip
        return Grid([("phase", ""), ("cost", "num")], lines)

    def _heads(self, columns: Sequence[Column]) -> list[tuple[str, str]]:
        heads = []
        for head, _, form in columns:
            kind = "num mine" if head.endswith("unlearned") else "num"
            heads.append((head, kind if form not in _TOLD else form if "path" in form else ""))
        return heads

    def _cell(self, entry: Any, place: str, column: Column) -> Any:
        _, key, form = column
        value = entry
        for part in key.split("/") if key else ():
            place += f"/{part}"
            if isinstance(value, list):
                value = value[int(part)]
            elif value is not None:
                value = value.get(part) if part in MODELS else value[part]
        if form in _TOLD:
            return _TOLD[form](value)
        form, _, interval = form.partition(" ")
        if not interval:
            return none("not measured") if value is None else self.number(place, form)
        if value is None or value["value"] is None:
            return none("no claim" if key in ("", "recovered") else "not measured")
        told, low, high = (self.number(f"{place}/{part}", form) for part in ("value", "low", "high"))
        if value["low"] is None or value["high"] is None:
            return told
        return told + Markup(' <span class="soft">({} to {})</span>').format(low, high)


def none(text: str) -> Markup:
    """What stands in the place of a number that is not there."""
    return Markup('<span class="none">{}</span>').format(text)


def pairs(name: str, value: str, told: Mapping[str, Any]) -> Grid:
    """A line an entry."""
    hashes = value == "SHA-256"
    heads = [(name, "path" if hashes else ""), (value, "hash" if hashes else "")]
    return Grid(heads, [[key, shown(each)] for key, each in told.items()])


def at(report: Mapping[str, Any], pointer: str) -> Any:
    """What stands at a JSON pointer (RFC 6901). Raises KeyError or IndexError for no place."""
    value: Any = report
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def pointer_part(name: str) -> str:
    """A key as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
