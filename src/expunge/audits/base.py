"""What every attack is given and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from expunge.audits.budgets import Budget
from expunge.data.rows import Row

if TYPE_CHECKING:
    from expunge.audits.subject import Subject

ModelName = Literal["target", "unlearned", "oracle"]
MODELS: tuple[ModelName, ...] = ("target", "unlearned", "oracle")
Kind = Literal["extraction", "membership", "fragility", "latent", "depth"]
"""Content that comes back; members told from non-members; damage to what was to stay; traces inside; how
far inside they are gone."""
Tuned = Literal["full", "lora"]
"""What attacks by tuning train: every weight, or a low-rank adapter beside them."""
Advance = Callable[[int, int], None]
"""Called with how much of an attack is done, and how much there is."""
Scores = Mapping[str, float]
"""By row id."""


@dataclass(frozen=True, repr=False)
class Case:
    """The rows of one erasure request, drawn to the budget, the same for every model."""

    facts: Sequence[Row]
    """Forget rows that the attacks try to get back."""
    members: Sequence[Row]
    """Forget documents that are read as a whole: more than are asked for, as one pass reads them."""
    forget: Sequence[Row]
    """All forget rows."""
    retain: Sequence[Row]
    """Retain rows that are asked for as a control."""
    tuning: Sequence[Row]
    """What benign relearning tunes on."""
    others: Sequence[Row]
    """All retain rows: solved examples and wrong answers are drawn from them."""
    nonmembers: Sequence[Row]
    """Never-seen documents; empty where none were given."""
    paraphrases: Mapping[str, Sequence[Row]]
    """By a fact's id other wordings of its question."""
    budget: Budget
    seed: int
    learning_rate: float
    """Of attacks by tuning that train every weight; the budget's factors multiply it."""
    tuned: Tuned = "full"
    """The same for every model: an oracle that is tuned in another way is no control."""


@dataclass(frozen=True, repr=False)
class Found:
    """What one attack found on one model. Only `texts` holds text."""

    scores: Mapping[str, Scores]
    """By variant of the attack."""
    beside: Sequence[str] = ()
    """Variants that are shown and count for no fact: direct questions, where an attack has them."""
    control: Mapping[str, Scores] = field(default_factory=dict)
    """The same on retain rows, where an attack asks for them."""
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By row id further numbers."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers of the whole attack."""
    tunings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By tuning, where an attack tunes, the variants that are its steps, the last one last."""
    texts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By variant and row id what was generated; kept only to reveal it."""

    def to_json(self, *, reveal: bool) -> dict[str, Any]:
        """As it is kept in a partial file."""
        values = dict(vars(self))
        return values if reveal else {**values, "texts": {}}


@dataclass(frozen=True)
class Attack:
    """One attack: what it is called, where it comes from, and how it is run."""

    name: str
    title: str
    kind: Kind
    reference: str
    how: str
    """Completes the sentence "... of the facts came back ..."."""
    run: Callable[[Subject, Case, Advance], Found]
    tunes: bool = False
    """Whether it trains the model, so that its result follows from how."""
    patches: bool = False
    """Whether it writes the model's states into the target, so that its result follows from both."""
