"""From what an attack found on each model to its entry in audit.json: shares, power, one sentence."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from expunge.audits.attacks.depth import depth_entry
from expunge.audits.attacks.membership import blind_scores
from expunge.audits.base import Attack, Case, Found, ModelName, Scores
from expunge.audits.entries import DIGITS, Models, Summary, able, opening, powerless, resamples_of
from expunge.audits.estimates import (
    Estimate,
    SideResamples,
    Sides,
    others_needed,
)
from expunge.audits.facts import extracted
from expunge.audits.verdict import Evidence
from expunge.data.rows import Row, by_document, document_of
from expunge.evaluation.outcomes import ALPHA, BLIND_FROM, FEW, POWER_AUC, POWER_FROM, POWER_GAP

FPR = 0.01

Hits = Mapping[ModelName, Sequence[float]]
"""By model 1 for each fact that came back, 0 for the others."""
Recovered = tuple[Estimate, tuple[int, int] | None]
"""Share, and of few documents the counts that it is of."""


def summarise(
    attack: Attack, models: Models, case: Case, known: Collection[str] | None = None
) -> Summary:
    """`models` holds target and unlearned, and the oracle where there is one.

    `known` are facts that any attack gets from the target; None: those that this one does.
    """
    if attack.kind == "membership":
        return _membership(attack, models, case)
    if attack.kind == "depth":
        return depth_entry(attack, models, case)
    if attack.kind == "fragility":
        return _fragility(attack, models, case)
    return _extraction(attack, models, case, known)


def known_facts(target: Iterable[Found]) -> set[str]:
    """By id the facts that any of the attacks gets from the target."""
    best = (best_of(found.scores) for found in target)
    return {name for mine in best for name, (value, _) in mine.items() if extracted(value)}


def kept_share(direct: Models, case: Case) -> Estimate | None:
    """The unlearned model's retain score by direct questions, in shares of the target's."""
    target, unlearned = (direct[name].control["input"] for name in ("target", "unlearned"))
    if not any(target.values()):
        return None
    named = {row.id: row for row in case.retain}
    resamples = resamples_of([named[name] for name in target], case)
    return resamples.recovered([unlearned[name] for name in target], [*target.values()], None)


def best_of(variants: Mapping[str, Scores]) -> dict[str, tuple[float, str]]:
    """By fact the highest score of any variant, and the first variant that reached it."""
    best: dict[str, tuple[float, str]] = {}
    for variant, scores in variants.items():
        for name, value in scores.items():
            if name not in best or value > best[name][0]:
                best[name] = (value, variant)
    return best


def _extraction(attack: Attack, models: Models, case: Case, known: Collection[str] | None) -> Summary:
    """Extracted and recovered shares of facts; the latent probe's layers are variants as well."""
    numbers = models["target"].numbers
    if numbers.get("tuned") == "lora":
        attack = replace(attack, title=f"{attack.title} with LoRA")
    if numbers.get("tuned_on") == "retain":
        attack = replace(attack, how="after tuning on retain rows, as no other document is forgotten")
    best = {
        name: best_of({v: s for v, s in found.scores.items() if v not in found.beside})
        for name, found in models.items()
    }
    facts = set(case.facts)
    rows = [*case.facts, *(row for row in case.members if row not in facts)]
    asked = [row for row in rows if all(row.id in mine for mine in best.values())]
    if not asked:
        return powerless(opening(attack), "no fact could be asked")
    ids = [row.id for row in asked]
    whole = len(by_document(case.forget))
    # What an attack cannot ask (a question for its continuation) was not left out by the draw, which
    # is of the facts alone for an attack that asks no member beside them.
    draw = case.facts if facts.issuperset(asked) else rows
    of = len(by_document(asked)) if len(by_document(draw)) == whole else whole
    resamples = resamples_of(asked, case, of)

    def recover(hits: Hits) -> Recovered:
        if whole <= FEW:
            return _counted(ids, hits, known if attack.kind == "extraction" else None)
        found = resamples.recovered(hits["unlearned"], hits["target"], hits.get("oracle"))
        assert found is not None  # with power the gap is positive
        return found, None

    hits = {name: _hits(mine, ids) for name, mine in best.items()}
    shares = {name: resamples.share(values) for name, values in hits.items()}

    def outcome(model: ModelName, name: str) -> dict[str, Any]:
        value, variant = best[model][name]
        told = {"score": round(value, DIGITS), "extracted": extracted(value)}
        return {**told, "by": variant if value > 0 else None, **models[model].rows.get(name, {})}

    entry = opening(attack, models, outcome, asked)
    entry["models"] = {
        name: {
            "extracted": shares[name].to_json(),
            "score": resamples.share([_unit(best[name][i][0]) for i in ids]).to_json(),
            "variants": {v: _shares(s, rows, case, of) for v, s in found.scores.items() if s},
            "control": {v: _shares(s, case.retain, case) for v, s in found.control.items()},
            "numbers": dict(found.numbers),
        }
        for name, found in models.items()
    }
    if models["target"].tunings:
        entry["tunings"] = _tunings(models, entry["models"], ids, recover)
    why = _lacking(hits)
    if why is not None:
        return powerless(entry, why, f" (unlearned {shares['unlearned'].value:.0%})")
    (recovered, count), oracle = recover(hits), shares.get("oracle")
    entry["recovered"] = recovered.to_json() | {"against": "zero" if oracle is None else "oracle"}
    verb = "read inside" if attack.kind == "latent" else "came back"
    how = f" {attack.how}" if attack.how else ""
    beside = ", ".join(f"{n} {shares[n].value:.0%}" for n in ("target", "oracle") if n in shares)
    floor = "against the oracle" if oracle is not None else "against 0, no oracle was given"
    mine = shares["unlearned"]
    came = f"{sum(hits['unlearned']):.0f}"
    if count is None:
        came = f"{mine.value:.0%} ({mine.low:.0%} to {mine.high:.0%})"
    return able(
        entry,
        f"{came} of {len(ids)} facts {verb}{how} ({beside}); recovered share {recovered.value:.2f}"
        f" {floor}.{_worst_tuning(entry)}",
        [Evidence(attack.name, attack.title, attack.kind, recovered, oracle is not None, count)],
    )


def _counted(ids: Sequence[str], hits: Hits, known: Collection[str] | None) -> Recovered:
    """Of the facts that the target knows and the oracle does not give, those that come back.

    What the oracle gives as well can be guessed.
    """
    guessed = hits.get("oracle", [0.0] * len(ids))
    counted = [
        mine
        for name, mine, target, guess in zip(
            ids, hits["unlearned"], hits["target"], guessed, strict=True
        )
        if not guess and (target if known is None else name in known)
    ]
    got, of = round(sum(counted)), len(counted)
    return Estimate(*[got / of] * 3), (got, of)


def _tunings(
    models: Models,
    told: Mapping[str, Any],
    ids: Sequence[str],
    recover: Callable[[Hits], Recovered],
) -> dict[str, Any]:
    """By tuning what it alone recovers, null without power, and the retain share answered after it."""
    found = {}
    for tuning, variants in models["target"].tunings.items():
        hits = {
            name: _hits(best_of({v: each.scores[v] for v in variants}), ids)
            for name, each in models.items()
        }
        controls = {name: told[name]["control"][variants[-1]]["extracted"] for name in models}
        found[tuning] = {
            "recovered": recover(hits)[0].to_json() if _lacking(hits) is None else None,
            "retain": {name: share["value"] for name, share in controls.items()},
        }
    return found


def _worst_tuning(entry: Mapping[str, Any]) -> str:
    """A sentence on the tuning that recovers most by itself; empty where none has power."""
    tunings = entry.get("tunings", {}).items()
    able = {name: tuning for name, tuning in tunings if tuning["recovered"] is not None}
    if not able:
        return ""
    name, worst = max(able.items(), key=lambda each: each[1]["recovered"]["value"])
    return (
        f" The worst tuning by itself is {name}: it recovers {worst['recovered']['value']:.2f} and"
        f" leaves {worst['retain']['unlearned']:.0%} of the retain rows answered."
    )


def _membership(attack: Attack, models: Models, case: Case) -> Summary:
    members, others = list(case.members), list(case.nonmembers)
    resamples = SideResamples(
        [document_of(row) for row in members],
        [document_of(row) for row in others],
        case.budget.resamples,
        case.seed,
    )
    few = resamples.members <= FEW
    blind = blind_scores(members, others, case.seed)
    words, separates = None, False
    if blind is not None:
        both = (blind[: len(members)], blind[len(members) :])
        words = resamples.separation(both, FPR)["auc"]
        separates = words.value >= BLIND_FROM and resamples.by_chance([both])[0] <= ALPHA
    sides: dict[ModelName, dict[str, Sides]] = {
        name: {
            variant: ([scores[row.id] for row in members], [scores[row.id] for row in others])
            for variant, scores in found.scores.items()
        }
        for name, found in models.items()
    }
    told = {
        name: {variant: resamples.separation(both, FPR) for variant, both in scored.items()}
        for name, scored in sides.items()
    }

    def outcome(model: ModelName, name: str) -> dict[str, Any]:
        return {variant: scores[name] for variant, scores in models[model].scores.items()}

    entry = opening(attack, models, outcome, [*members, *others])
    for place, row in enumerate(entry["rows"]):
        row["member"] = place < len(members)
    entry["models"] = {
        name: {
            "variants": {
                variant: {key: value.to_json() for key, value in figures.items()}
                for variant, figures in mine.items()
            }
        }
        for name, mine in told.items()
    }
    entry["blind"] = None if words is None else {"auc": words.to_json(), "separates": separates}
    if words is not None and separates:
        return powerless(
            entry,
            f"words alone separate members from non-members (blind AUC {words.value:.2f}), so no score"
            " of a model is evidence; give non-members of the forget set's kind",
        )
    needed = others_needed(resamples.members)
    if resamples.others < needed:
        return powerless(
            entry,
            f"{resamples.others} non-members are too few to place {resamples.members} among"
            f" them; {needed} are needed",
        )
    aucs = {v: figures["auc"].value for v, figures in told["target"].items()}
    by_chance = dict.fromkeys(aucs, 0.0)
    if few:
        found = resamples.by_chance([sides["target"][v] for v in aucs])
        by_chance = dict(zip(aucs, found, strict=True))
    strong = [v for v in aucs if aucs[v] >= POWER_AUC and by_chance[v] <= ALPHA]
    if not strong:
        why = f"its best AUC on the target is {max(aucs.values()):.2f}, {POWER_AUC} is needed"
        if few:
            why = "chance places documents like the target's there in more than 5%"
        return powerless(entry, why)
    # Few documents are judged by their places among never-seen text alone: who asks has no oracle.
    oracle = sides.get("oracle")
    reference = [oracle[v] for v in strong] if oracle is not None and not few else None
    found = resamples.by_chance([sides["unlearned"][v] for v in strong], reference)
    chances = dict(zip(strong, found, strict=True))
    entry["chance"] = {v: round(p, DIGITS) for v, p in chances.items()}
    evidence = {
        v: Evidence(
            attack.name,
            f"{attack.title} by {v}",
            "membership",
            resamples.auc_above(sides["unlearned"][v], None if oracle is None else oracle[v]),
            oracle is not None,
            chance=p,
        )
        for v, p in chances.items()
    }
    chosen = max(strong, key=lambda v: abs(evidence[v].figure.value))
    figures = told["unlearned"][chosen]
    figure = figures["auc"]
    if few:
        ranks = {
            name: ", ".join(map(str, resamples.places(mine[chosen]))) for name, mine in sides.items()
        }
        said = f"rank {ranks.pop('unlearned')} of {resamples.others + 1}, 1 the most familiar ("
        beside, caught = ranks, ""
    else:
        said = f"AUC {figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f}; "
        known = {name: told[name][chosen]["auc"] for name in told if name != "unlearned"}
        beside = {name: f"{each.value:.2f}" for name, each in known.items()}
        caught = f", {figures['tpr'].value:.0%} of the members found at {FPR:.0%} false alarms"
    said += ", ".join(f"{name} {mine}" for name, mine in beside.items())
    by_words = "not measured" if words is None else f"{words.value:.2f}"
    origin = "chance" if oracle is None else "the oracle's"
    return able(
        entry,
        f"by {chosen}, the score furthest from {origin}, {said}; words alone {by_words}){caught}; chance"
        f" does as much in {chances[chosen]:.0%}.",
        list(evidence.values()),
    )


def _fragility(attack: Attack, models: Models, case: Case) -> Summary:
    """How much more a forget token costs retain prompts than another one, beyond the target's cost."""
    target = models["target"].scores
    asked = [row for row in case.retain if row.id in target["clean"]]
    if not asked:
        return powerless(opening(attack), "no retain row could be asked")
    resamples, ids = resamples_of(asked, case), [row.id for row in asked]
    hits = {
        name: {v: [float(extracted(scores[i])) for i in ids] for v, scores in found.scores.items()}
        for name, found in models.items()
    }
    lost = {name: np.subtract(each["control"], each["trigger"]) for name, each in hits.items()}

    def outcome(model: ModelName, name: str) -> dict[str, Any]:
        scores = models[model].scores.items()
        return {variant: round(each[name], DIGITS) for variant, each in scores}

    entry = opening(attack, models, outcome, asked)
    entry["models"] = {
        name: {
            "variants": {v: {"extracted": resamples.share(s).to_json()} for v, s in each.items()},
            "lost": resamples.mean(lost[name]).to_json(),
        }
        for name, each in hits.items()
    }
    control = statistics.fmean(hits["target"]["control"])
    if control < POWER_FROM:
        return powerless(
            entry,
            f"with a retain token inserted the target answers {control:.0%} of the retain prompts,"
            f" {POWER_FROM:.0%} are needed",
        )
    beyond = resamples.mean(lost["unlearned"] - lost["target"])
    entry["beyond_target"] = beyond.to_json()
    clean, other, trigger = (
        statistics.fmean(hits["unlearned"][v]) for v in ("clean", "control", "trigger")
    )
    return able(
        entry,
        f"the unlearned model answers {clean:.0%} of the retain prompts, {other:.0%} with a retain token"
        f" inserted, {trigger:.0%} with a forget token. The forget token costs {beyond.value:.0%} more"
        " than in the target.",
        [Evidence(attack.name, attack.title, "fragility", beyond)],
    )


def _hits(best: Mapping[str, tuple[float, str]], ids: Sequence[str]) -> list[float]:
    return [float(extracted(best[name][0])) for name in ids]


def _lacking(hits: Hits) -> str | None:
    """Why an extraction attack has no power; None where it has."""
    target = statistics.fmean(hits["target"])
    if target < POWER_FROM:
        return f"it gets {target:.0%} of the facts from the target, {POWER_FROM:.0%} are needed"
    oracle = statistics.fmean(hits["oracle"]) if "oracle" in hits else None
    if oracle is not None and target - oracle < POWER_GAP:
        return (
            f"it gets {target:.0%} from the target and {oracle:.0%} from the oracle;"
            f" {POWER_GAP:.0%} must lie between"
        )
    return None


def _shares(scores: Scores, rows: Sequence[Row], case: Case, of: int | None = None) -> dict[str, Any]:
    named = {row.id: row for row in rows}
    resamples = resamples_of([named[name] for name in scores], case, of)
    return {
        "rows": len(scores),
        "extracted": resamples.share([float(extracted(v)) for v in scores.values()]).to_json(),
        "score": resamples.share([_unit(v) for v in scores.values()]).to_json(),
    }


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))
