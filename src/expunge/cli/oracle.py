"""`expunge oracle`: the base trained on the rows to keep, which is what a result is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from expunge.cli import run
from expunge.errors import InputError
from expunge.methods.retrain import Retrain
from expunge.runs.run import RunInputs

_ABOUT = """
expunge oracle BASE --retain R --output DIR

Trains BASE, the model from before the fine-tune, on the rows to keep: --method retrain of `expunge run`
and its options. Repeat the recipe of the fine-tune. DIR is what `expunge audit --oracle` takes.
"""


@dataclass(frozen=True)
class OracleInputs(RunInputs):
    """Those of a run; rows to remove need not be given."""

    model: str = ""
    """The model from before the fine-tune: a directory, or a hub id."""
    forget: str = ""
    """Rows that no row to keep may repeat; null: not looked at."""
    output: str = ""
    """The directory to write: the oracle, with the record of its training."""
    nonmembers: Annotated[str | None, tyro.conf.Suppress] = None
    base: Annotated[str | None, tyro.conf.Suppress] = None

    def __post_init__(self) -> None:
        for name in ("model", "retain", "output"):
            if not getattr(self, name):
                option = "BASE" if name == "model" else f"--{name}"
                raise InputError(f"{option}: is missing; see expunge oracle --help")
        object.__setattr__(self, "base", self.model)


def main(arguments: Sequence[str]) -> int:
    """Parses, trains, says where the result is."""
    return run.main(arguments, "expunge oracle", OracleInputs, _ABOUT, Retrain.name)
