"""The options of `expunge evaluate` beyond the default protocol's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from expunge.errors import InputError
from expunge.evaluation.measuring import MeasureInputs

ProtocolName = Literal["semeval", "tofu", "muse", "rwku"]
OWN: Mapping[str, tuple[str, ...]] = {
    "semeval": (
        "retain",
        "members",
        "nonmembers",
        "mmlu",
        "mmlu_shots",
        "harness",
        "harness_include",
        "columns",
        "joiner",
    ),
    "tofu": ("retain", "real_authors", "world_facts", "oracle_scores", "columns", "joiner"),
    "muse": (
        "forget_questions",
        "forget_solved",
        "retain_questions",
        "retain_solved",
        "members",
        "nonmembers",
        "oracle_scores",
        "columns",
        "joiner",
    ),
    "rwku": (
        "forget_level1",
        "forget_level3",
        "neighbor_level1",
        "neighbor_level2",
        "mia_forget",
        "mia_retain",
    ),
}
"""By protocol the options that not every one takes."""


@dataclass(frozen=True)
class ProtocolInputs(MeasureInputs):
    """What is measured, by which protocol."""

    protocol: ProtocolName = "semeval"
    """What is measured, and how. semeval: the scorecard of SemEval-2025 Task 4."""
    real_authors: str | None = None
    """TOFU's questions on real authors, with wrong answers. Model utility needs them."""
    world_facts: str | None = None
    """TOFU's questions on the world, with wrong answers. Model utility needs them."""
    oracle_scores: str | None = None
    """Scores of a model retrained without the forget set, by the same protocol. Forget quality and
    PrivLeak are relative to it."""
    forget_questions: str | None = None
    """MUSE's questions on the forget set, for KnowMem."""
    forget_solved: str | None = None
    """Solved questions that stand before each of --forget-questions; MUSE has ten."""
    retain_questions: str | None = None
    """MUSE's questions on what was to stay, for KnowMem."""
    retain_solved: str | None = None
    """Solved questions that stand before each of --retain-questions; MUSE has ten."""
    forget_level1: str | None = None
    """RWKU's blanks on the forget targets; --forget takes its level 2, the questions."""
    forget_level3: str | None = None
    """RWKU's questions on the forget targets as attacks put them, each of a `type`."""
    neighbor_level1: str | None = None
    """RWKU's blanks on the targets' neighbours."""
    neighbor_level2: str | None = None
    """RWKU's questions on the targets' neighbours."""
    mia_forget: str | None = None
    """RWKU's passages on the forget targets, for their loss."""
    mia_retain: str | None = None
    """RWKU's passages on anything else, for their loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol == "muse" and self.chat_template == "on":
            raise InputError(
                "--chat-template: is not of --protocol muse, whose prompts are plain; leave it out"
            )
        if self.protocol == "muse":
            object.__setattr__(self, "chat_template", "off")
        if self.protocol == "rwku" and self.chat_template == "auto":
            object.__setattr__(self, "chat_template", "on")
        for field in fields(self):
            owners = [name for name, own in OWN.items() if field.name in own]
            given = getattr(self, field.name) != field.default
            if given and owners and self.protocol not in owners:
                raise InputError(
                    f"--{field.name}: is of --protocol {owners[0]}, this is {self.protocol}; leave"
                    " it out"
                )

    @property
    def sources(self) -> dict[str, str | None]:
        """What is read, by option; every option of a protocol beside SemEval's names a file."""
        own = {field.name for field in fields(ProtocolInputs)}
        own -= {"protocol", *(field.name for field in fields(MeasureInputs))}
        return {**super().sources, **{name: getattr(self, name) for name in sorted(own)}}
