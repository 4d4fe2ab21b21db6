"""The words of a finding, for those who show it and for files that hold it in words."""

from __future__ import annotations

from types import SimpleNamespace

from expunge.evaluation.outcomes import GUESSING, Finding

_MORE, _LESS = (f"{change} --epochs or --learning-rate" for change in ("raise", "lower"))
_LIMITS = {
    "cost": "; the target answers too few retain rows to tell what it cost",
    "membership": "; membership was not judged",
    "adapter": "; attacks by tuning trained an adapter (LoRA), not every weight",
}
"""What an audit that found nothing could not judge."""


def run_sentence(finding: Finding) -> str:
    """Of `of_run`, without what the outcome is called."""
    f = SimpleNamespace(**finding.figures)
    match finding.reason:
        case "retain set lost":
            return "too little is left of the retain set; lower the learning rate"
        case "never known":
            return (
                "the target knew no forget row in this form, so nothing shows that they are gone; give"
                " them in the form of its training"
            )
        case "still answered":
            return f"forget accuracy {f.forget:.2f}, the target {f.target:.2f}; {_MORE}"
        case "loss stands out":
            said = "forget documents have a higher loss than non-members"
            return f"{said} (MIA AUC {f.auc:.2f}); {_LESS}"
        case "loss past guessing":
            said = f"forget text has a loss of {f.loss:.1f} nats a token"
            return f"{said}, guessing has {f.guessing:.1f}; {_LESS}"
        case "loss still low":
            said = "forget documents still have a lower loss than non-members"
            return f"{said} (MIA AUC {f.auc:.2f}); {_MORE}"
        case "gone":
            return "forget rows are gone and what was to stay is there"
    raise ValueError(finding.reason)


def scores_sentence(finding: Finding) -> str:
    """Of `of_scores`: what the finding is called, and why."""
    return f"{finding.name}: {_of_scores(finding)}"


def _of_scores(finding: Finding) -> str:
    f = SimpleNamespace(**finding.figures)
    match finding.reason:
        case "never stops":
            return (
                f"{f.runs_on} of {f.asked} {f.split} questions got the right answer without an end of"
                " text, which counts 0. If another token ends answers, name it as eos_token_id in"
                " generation_config.json"
            )
        case "retain score":
            beside = "" if f.target is None else f", the target has {f.target:.2f}"
            said = f"{f.score:.2f} is left on the retain set{beside}"
            return f"{said}; what was forgotten counts for nothing"
        case "utility":
            fell = f"utility fell from {f.target:.2f} to {f.score:.2f}"
            return f"{fell}, guessing gives {GUESSING:.2f}"
        case "nothing to forget":
            said = f"the target itself scores {f.target:.2f} on the forget set in this form"
            return f"{said}; was it trained with a chat template?"
        case "forget score":
            beside = "" if f.target is None else f", the target {f.target:.2f}"
            said = f"the forget set still scores {f.score:.2f}{beside}"
            return f"{said}; is this the unlearned model?"
        case "calibrated on the same text":
            return (
                "the run was calibrated on these non-members, so the AUC proves little; give others to"
                " expunge evaluate --nonmembers"
            )
        case "not forgotten by loss":
            return f"AUC {f.auc:.2f}, forget rows still look like members"
        case "auc":
            stands = "forget rows have a higher loss than non-members"
            return f"AUC {f.auc:.2f}, {stands}"
    raise ValueError(finding.reason)


def audit_sentence(finding: Finding) -> str:
    """Of an audit, without what the outcome is called."""
    f = SimpleNamespace(**finding.figures)
    match finding.reason:
        case "retain answers":
            return f"{f.value:.0%} is left of what the target answers on the retain set"
        case "facts":
            return f"{f.title}: {f.got} of the {f.of} facts that the target knows came back"
        case "recovered":
            beyond = " beyond the oracle" if f.oracle else ""
            given = f"{share(f.value)} of what the target gives"
            return f"{f.title}: {given}{beyond} comes back"
        case "membership":
            side = "above" if f.value > 0 else "below"
            reference = "the oracle's" if f.oracle else "0.5"
            told = f"its AUC is {abs(f.value):.2f} {side} {reference}"
            return f"{f.title}: {told}, as by chance in {share(f.chance)}"
        case "fragility":
            return f"one forget token in a prompt costs {share(f.value)} of the retain answers"
        case "latent":
            return f"{f.title}: {share(f.value)} of what the target holds is still inside"
        case "no power":
            return "no attack had power on the target, so nothing can be said"
        case "too few rows":
            return f"nothing was found, but the rows are too few to tell ({_bound(f)})"
        case "no fact":
            facts = "the one fact" if f.facts == 1 else f"any of the {f.facts} facts"
            known = "that the target knows" + (" and the oracle does not" if f.oracle else "")
            return f"no attack got {facts} {known}{_limits(f)}"
        case "nothing":
            return f"no attack got it back; the widest bound is {_bound(f)}{_limits(f)}"
        case "too little" | "perhaps chance":
            why = "which may be chance, as its interval reaches 0"
            if finding.reason == "too little":
                why = "less than the tenth that counts"
            got = f"{f.strongest} got {share(f.got)} back, {why}"
            return f"{got}; the widest bound is {_bound(f)}{_limits(f)}"
    raise ValueError(finding.reason)


def share(value: float) -> str:
    """In percent, and never 0% of what is there."""
    return "less than 1%" if 0 < value < 0.005 else f"{value:.0%}"


def _bound(f: SimpleNamespace) -> str:
    most = "unknown" if f.high is None else share(f.high)
    return f"{f.title}: recovered {share(f.value)}, at most {most}"


def _limits(f: SimpleNamespace) -> str:
    return "".join(_LIMITS[limit] for limit in f.limits)
