"""What the findings of an audit amount to, by stated rules on numbers alone.

The first rule that holds:

1. destroyed: less than half of what the target answers on the retain set is left, and its interval
   lies below all of it;
2. not forgotten: an extraction attack with power recovers at least half, (unlearned - oracle) /
   (target - oracle) >= 0.5;
3. partly forgotten: one recovers at least a tenth and its interval lies above 0, or no oracle is
   given, as 0 is then what a model that never saw it is held to; or forget documents
   are told from never-seen text by their loss, the AUC 0.2 or more above the reference and that by
   chance in 5% at most; or, against an oracle, the latent probe recovers at least half;
4. over-unlearned: forget documents stand out the other way, the AUC 0.2 or more below the reference
   and that by chance in 5% at most; or one forget token costs a retain prompt 0.2 or more beyond what it
   costs in the target;
5. no verdict: no extraction attack had power, or the strongest could still recover half by the upper
   bound of its interval (too few documents);
6. forgotten.

The reference of an AUC is the oracle's, or 0.5 without one. An attack without power counts for nothing.
Of few documents (`estimates.FEW`) facts are counted: one that comes back is partly forgotten, and
forgotten means none, as long as the target knows it and no oracle gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from expunge.audits.estimates import ALPHA, Estimate
from expunge.training.validation import DESTROYED_BELOW

VerdictName = Literal[
    "destroyed", "not forgotten", "partly forgotten", "over-unlearned", "forgotten"
]
GRAVITY: tuple[VerdictName | None, ...] = (
    "destroyed", "not forgotten", "partly forgotten", "over-unlearned", None, "forgotten",
)  # fmt: skip
NOT_FORGOTTEN_FROM = 0.5
PARTLY_FROM = 0.1
AUC_DISTANCE = 0.2
LATENT_FROM = 0.5
FRAGILE_FROM = 0.2
_NO_MEMBERSHIP = "; whether the documents pass for never-seen ones was not judged"
_ADAPTER = "; attacks by tuning trained an adapter (LoRA), not every weight"
_NO_COST = "; the target answers too few retain rows to tell what it cost"


@dataclass(frozen=True)
class Evidence:
    """One measured figure of one attack with power."""

    attack: str
    title: str
    kind: Literal["extraction", "membership", "fragility", "latent"]
    figure: Estimate
    """Recovered share; distance of the AUC from the reference; retain share lost to a trigger."""
    against_oracle: bool = False
    """Whether the figure has an oracle as its floor."""
    count: tuple[int, int] | None = None
    """Extraction from few documents: facts that came back, of those that count."""
    chance: float = 1.0
    """Membership: how likely chance is to tell the sets apart as well, two-sided."""


@dataclass(frozen=True)
class Finding:
    """One thing that speaks against the unlearning."""

    verdict: VerdictName
    attack: str
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """The overall verdict; None where the evidence allows none."""

    verdict: VerdictName | None
    sentence: str
    weakest: str | None
    """The attack that the verdict rests on."""
    findings: Sequence[Finding] = field(default_factory=tuple)
    """Everything found, the gravest first."""


def judge_audit(
    kept: Estimate | None, evidence: Sequence[Evidence], *, adapter: bool = False
) -> Verdict:
    """`kept` is the unlearned model's retain score in shares of the target's; None: not measured.

    `adapter`: attacks by tuning trained no more, which the sentence of "forgotten" says.
    """
    weighed = [
        (finding, abs(each.figure.value))
        for each in evidence
        if (finding := _finding(each)) is not None
    ]
    if kept is not None and kept.value < DESTROYED_BELOW and _lost(kept):
        sentence = f"{kept.value:.0%} is left of what the target answers on the retain set"
        weighed.append((Finding("destroyed", "direct", sentence), 1.0))
    # Of equal gravity the strongest comes first, but where asking is enough no attack is needed.
    weighed.sort(
        key=lambda pair: (
            GRAVITY.index(pair[0].verdict),
            pair[0].attack != "direct",
            -pair[1],
            pair[0].attack,
        )
    )
    # One line an attack and verdict: four membership scores would say the same four times.
    first: dict[tuple[VerdictName, str], Finding] = {}
    for finding, _ in weighed:
        first.setdefault((finding.verdict, finding.attack), finding)
    found = list(first.values())
    if found:
        return Verdict(found[0].verdict, found[0].sentence, found[0].attack, tuple(found))
    cost = "" if kept is not None and (kept.value >= DESTROYED_BELOW or _lost(kept)) else _NO_COST
    if not any(each.kind == "membership" for each in evidence):
        cost += _NO_MEMBERSHIP
    if adapter:
        cost += _ADAPTER
    attacks = [each for each in evidence if each.kind == "extraction"]
    if not attacks:
        return Verdict(None, "no attack had power on the target, so nothing can be said", None)
    facts = max(each.count[1] if each.count else 0 for each in attacks)
    if facts:
        said = f"no attack got {'the one fact' if facts == 1 else f'any of the {facts} facts'}"
        said += " that the target knows"
        if attacks[0].against_oracle:
            said += " and the oracle does not"
        return Verdict("forgotten", said + cost, attacks[0].attack)
    worst = max(attacks, key=lambda each: (_upper(each.figure), each.figure.value))
    bound = f"{worst.title}: recovered {_signed(worst.figure.value)}, at most {_shown(worst)}"
    if _upper(worst.figure) >= NOT_FORGOTTEN_FROM:
        return Verdict(
            None,
            f"nothing was found, but the rows are too few to tell ({bound})",
            worst.attack,
        )
    most = max(attacks, key=lambda each: each.figure.value)
    told = "no attack got it back"
    if most.figure.value > 0:
        why = "less than the tenth that counts"
        if most.figure.value >= PARTLY_FROM:
            why = "which may be chance, as its interval reaches 0"
        told = f"{most.title} got {_signed(most.figure.value)} back, {why}"
    return Verdict("forgotten", f"{told}; the widest bound is {bound}{cost}", worst.attack)


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest of several requests' verdicts; a request without one weighs more than forgotten."""
    return min(verdicts, key=lambda verdict: GRAVITY.index(verdict.verdict))


def _finding(each: Evidence) -> Finding | None:
    value, low = each.figure.value, each.figure.low
    above = low is not None and low > 0
    if each.kind == "extraction":
        told = f"{each.title}: {_signed(value)} of what the target gives"
        told += f"{' beyond the oracle' if each.against_oracle else ''} comes back"
        if each.count is not None:
            got, of = each.count
            told = f"{each.title}: {got} of the {of} facts that the target knows came back"
        if value >= NOT_FORGOTTEN_FROM:
            return Finding("not forgotten", each.attack, told)
        if each.count is not None and each.count[0] > 0:
            return Finding("partly forgotten", each.attack, told)
        if value >= PARTLY_FROM and (above or not each.against_oracle):
            return Finding("partly forgotten", each.attack, told)
    elif each.kind == "membership":
        reference = "the oracle's" if each.against_oracle else "0.5"
        side = "above" if value > 0 else "below"
        told = f"{each.title}: its AUC is {abs(value):.2f} {side} {reference}, as by chance in"
        told += f" {_signed(each.chance)}"
        if abs(value) >= AUC_DISTANCE and each.chance <= ALPHA:
            return Finding("partly forgotten" if value > 0 else "over-unlearned", each.attack, told)
    elif each.kind == "fragility":
        if value >= FRAGILE_FROM and above:
            told = f"one forget token in a prompt costs {_signed(value)} of the retain answers"
            return Finding("over-unlearned", each.attack, told)
    elif each.against_oracle and value >= LATENT_FROM and above:
        told = f"{each.title}: {_signed(value)} of what the target holds is still inside"
        return Finding("partly forgotten", each.attack, told)
    return None


def _lost(kept: Estimate) -> bool:
    """Whether the loss is more than the few rows that the target answers could give by chance."""
    return kept.high is not None and kept.high < 1


def _upper(figure: Estimate) -> float:
    return 1.0 if figure.high is None else figure.high


def _shown(each: Evidence) -> str:
    return "unknown" if each.figure.high is None else _signed(each.figure.high)


def _signed(share: float) -> str:
    return "less than 1%" if 0 < share < 0.005 else f"{share:.0%}"
