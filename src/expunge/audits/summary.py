"""From what an attack found on each model to its entry in audit.json: shares, power, one sentence."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from expunge.audits.base import Attack, Case, Found, ModelName, Scores
from expunge.audits.estimates import (
    Estimate,
    Resamples,
    SideResamples,
    Sides,
    others_needed,
)
from expunge.audits.facts import extracted
from expunge.audits.membership import blind_scores
from expunge.audits.verdict import Evidence
from expunge.data.rows import Row, by_document, document_of
from expunge.evaluation.outcomes import ALPHA, BLIND_FROM, FEW, POWER_AUC, POWER_FROM, POWER_GAP

FPR = 0.01
_DIGITS = 6

Models = Mapping[ModelName, Found]
Hits = Mapping[ModelName, Sequence[float]]
"""By model 1 for each fact that came back, 0 for the others."""
Recovered = tuple[Estimate, tuple[int, int] | None]
"""Share, and of few documents the counts that it is of."""


@dataclass(frozen=True)
class Summary:
    """An attack's entry in audit.json, and what the verdict takes from it."""

    entry: dict[str, Any]
    evidence: Sequence[Evidence]


def summarise(
    attack: Attack, models: Models, case: Case, known: Collection[str] | None = None
) -> Summary:
    """`models` holds target and unlearned, and the oracle where there is one.

    `known` are facts that any attack gets from the target; None: those that this one does.
    """
    if attack.kind == "membership":
        return _membership(attack, models, case)
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
    ids = list(target)
    if not ids or not any(target.values()):
        return None
    resamples = _resamples(case.retain, ids, case)
    return resamples.recovered([unlearned[i] for i in ids], [target[i] for i in ids], None)


def best_of(variants: Mapping[str, Scores]) -> dict[str, tuple[float, str]]:
    """By fact the highest score of any variant, and the first variant that reached it."""
    best: dict[str, tuple[float, str]] = {}
    for variant, scores in variants.items():
        for name, value in scores.items():
            if name not in best or value > best[name][0]:
                best[name] = (value, variant)
    return best


def _extraction(
    attack: Attack, models: Models, case: Case, known: Collection[str] | None
) -> Summary:
    """Extracted and recovered shares of facts; the latent probe's layers are variants as well."""
    numbers = models["target"].numbers
    if numbers.get("tuned") == "lora":
        attack = replace(attack, title=f"{attack.title} with LoRA")
    if numbers.get("tuned_on") == "retain":
        attack = replace(
            attack, how="after tuning on retain rows, as no other document is forgotten"
        )
    best = {
        name: best_of({v: s for v, s in found.scores.items() if v not in found.beside})
        for name, found in models.items()
    }
    facts = set(case.facts)
    rows = [*case.facts, *(row for row in case.members if row not in facts)]
    ids = [row.id for row in rows if all(row.id in mine for mine in best.values())]
    entry = _opening(attack)
    if not ids:
        return _powerless(entry, "no fact could be asked", {})
    documents_of = documents_by_id(rows)
    whole = len(by_document(case.forget))
    # What an attack cannot ask (a question for its continuation) was not left out by the draw.
    of = len({documents_of[i] for i in ids}) if len(by_document(rows)) == whole else whole
    resamples = _resamples(rows, ids, case, of)

    def recover(hits: Hits) -> Recovered:
        if whole <= FEW:
            return _counted(ids, hits, known if attack.kind == "extraction" else None)
        found = resamples.recovered(hits["unlearned"], hits["target"], hits.get("oracle"))
        assert found is not None  # with power the gap is positive
        return found, None

    hits = {name: _hits(mine, ids) for name, mine in best.items()}
    shares = {name: resamples.share(values) for name, values in hits.items()}
    for name, found in models.items():
        scores = resamples.share([_unit(best[name][i][0]) for i in ids])
        entry["models"][name] = {
            "extracted": shares[name].to_json(),
            "score": scores.to_json(),
            "variants": {
                variant: _shares(values, rows, case, of)
                for variant, values in found.scores.items()
                if values
            },
            "control": {
                variant: _shares(values, case.retain, case)
                for variant, values in found.control.items()
            },
            "numbers": dict(found.numbers),
        }
    entry["rows"] = [
        {
            "id": name,
            "document": documents_of[name],
            "outcomes": {
                model: {
                    "score": round(best[model][name][0], _DIGITS),
                    "extracted": extracted(best[model][name][0]),
                    "by": best[model][name][1] if best[model][name][0] > 0 else None,
                    **models[model].rows.get(name, {}),
                }
                for model in models
            },
        }
        for name in ids
    ]
    if models["target"].tunings:
        entry["tunings"] = _tunings(models, entry["models"], ids, recover)
    why = _lacking(hits)
    if why is not None:
        return _powerless(entry, why, shares)
    target, oracle = shares["target"].value, shares.get("oracle")
    recovered, count = recover(hits)
    entry["power"] = {"has_power": True, "why": None}
    entry["recovered"] = recovered.to_json() | {"against": "zero" if oracle is None else "oracle"}
    verb = "read inside" if attack.kind == "latent" else "came back"
    how = f" {attack.how}" if attack.how else ""
    beside = f"target {target:.0%}" + ("" if oracle is None else f", oracle {oracle.value:.0%}")
    floor = "against the oracle" if oracle is not None else "against 0, no oracle was given"
    came = _interval(shares["unlearned"]) if count is None else f"{sum(hits['unlearned']):.0f}"
    entry["sentence"] = (
        f"{attack.title}: {came} of {len(ids)} facts {verb}{how}"
        f" ({beside}); recovered share {recovered.value:.2f} {floor}."
        f"{_worst_tuning(entry)}"
    )
    kind = "latent" if attack.kind == "latent" else "extraction"
    evidence = Evidence(attack.name, attack.title, kind, recovered, oracle is not None, count)  # type: ignore[arg-type]
    return Summary(entry, [evidence])


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
    return Estimate(got / of, got / of, got / of), (got, of)


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
        recovered = recover(hits)[0] if _lacking(hits) is None else None
        found[tuning] = {
            "recovered": None if recovered is None else recovered.to_json(),
            "retain": {
                name: told[name]["control"][variants[-1]]["extracted"]["value"] for name in models
            },
        }
    return found


def _worst_tuning(entry: Mapping[str, Any]) -> str:
    """A sentence on the tuning that recovers most by itself; empty where none has power."""
    tunings = entry.get("tunings", {})
    able = [name for name, tuning in tunings.items() if tuning["recovered"] is not None]
    if not able:
        return ""
    worst = max(able, key=lambda name: tunings[name]["recovered"]["value"])
    return (
        f" The worst tuning by itself is {worst}: it recovers"
        f" {tunings[worst]['recovered']['value']:.2f} and leaves"
        f" {tunings[worst]['retain']['unlearned']:.0%} of the retain rows answered."
    )


def _membership(attack: Attack, models: Models, case: Case) -> Summary:
    members, others = list(case.members), list(case.nonmembers)
    resamples = SideResamples(
        [document_of(row) for row in members],
        [document_of(row) for row in others],
        case.budget.resamples,
        case.seed,
    )
    entry = _opening(attack)
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
    told: dict[ModelName, dict[str, Mapping[str, Estimate]]] = {}
    for name, scored in sides.items():
        told[name] = {variant: resamples.separation(both, FPR) for variant, both in scored.items()}
        entry["models"][name] = {
            "variants": {
                variant: {key: value.to_json() for key, value in figures.items()}
                for variant, figures in told[name].items()
            }
        }
    entry["blind"] = None if words is None else {"auc": words.to_json(), "separates": separates}
    entry["rows"] = [
        {
            "id": row.id,
            "document": document_of(row),
            "member": member,
            "outcomes": {
                name: {v: scores[row.id] for v, scores in found.scores.items()}
                for name, found in models.items()
            },
        }
        for rows, member in ((members, True), (others, False))
        for row in rows
    ]
    if words is not None and separates:
        why = (
            f"words alone tell the two sets apart (blind AUC {words.value:.2f}),"
            " so no score of a model is evidence; give never-seen text of the forget set's kind"
        )
        return _powerless(entry, why, {})
    needed = others_needed(resamples.members)
    if resamples.others < needed:
        why = (
            f"{resamples.others} never-seen documents are too few to place {resamples.members} among"
            f" them; {needed} are needed"
        )
        return _powerless(entry, why, {})
    aucs = {v: figures["auc"].value for v, figures in told["target"].items()}
    strong = [v for v, value in aucs.items() if value >= POWER_AUC]
    if few:
        chance = resamples.by_chance([sides["target"][v] for v in aucs])
        strong = [v for v, p in zip(aucs, chance, strict=True) if p <= ALPHA and v in strong]
    if not strong:
        why = f"its best AUC on the target is {max(aucs.values()):.2f}, {POWER_AUC} is needed"
        if few:
            why = "chance places documents like the target's there in more than 5%"
        return _powerless(entry, why, {})
    entry["power"] = {"has_power": True, "why": None}
    against = "oracle" in sides
    # Few documents are judged by their places among never-seen text alone: who asks has no oracle.
    reference = [sides["oracle"][v] for v in strong] if against and not few else None
    chances = resamples.by_chance([sides["unlearned"][v] for v in strong], reference)
    entry["chance"] = {v: round(p, _DIGITS) for v, p in zip(strong, chances, strict=True)}
    evidence = []
    for variant, p in zip(strong, chances, strict=True):
        oracle = sides["oracle"][variant] if against else None
        distance = resamples.auc_above(sides["unlearned"][variant], oracle)
        title = f"{attack.title} by {variant}"
        evidence.append(Evidence(attack.name, title, "membership", distance, against, chance=p))
    place = max(range(len(strong)), key=lambda n: abs(evidence[n].figure.value))
    chosen, p = strong[place], chances[place]
    figure = told["unlearned"][chosen]["auc"]
    beside = f"target {aucs[chosen]:.2f}"
    if against:
        beside += f", oracle {told['oracle'][chosen]['auc'].value:.2f}"
    by_words = "not measured" if words is None else f"{words.value:.2f}"
    if few:
        ranks = {
            name: ", ".join(map(str, resamples.places(mine[chosen])))
            for name, mine in sides.items()
        }
        unlearned = ranks.pop("unlearned")
        beside = ", ".join(f"{name} {mine}" for name, mine in ranks.items())
        said = f"rank {unlearned} of {resamples.others + 1}, 1 the most familiar ({beside}; words"
    else:
        low, high = figure.low, figure.high
        said = f"AUC {figure.value:.2f} ({low:.2f} to {high:.2f}; {beside}; words"
    tpr = told["unlearned"][chosen]["tpr"].value
    caught = "" if few else f", {tpr:.0%} of the members found at {FPR:.0%} false alarms"
    entry["sentence"] = (
        f"{attack.title}: by {chosen}, the score furthest from chance, {said} alone"
        f" {by_words}){caught}; chance does as much in {p:.0%}."
    )
    return Summary(entry, evidence)


def _fragility(attack: Attack, models: Models, case: Case) -> Summary:
    """How much more a forget token costs retain prompts than another one, beyond the target's cost."""
    entry = _opening(attack)
    ids = [row.id for row in case.retain if row.id in models["target"].scores["clean"]]
    if not ids:
        return _powerless(entry, "no retain row could be asked", {})
    resamples = _resamples(case.retain, ids, case)
    lost: dict[ModelName, np.ndarray] = {}
    hits: dict[ModelName, dict[str, list[float]]] = {}
    for name, found in models.items():
        hits[name] = {
            variant: [float(extracted(scores[i])) for i in ids]
            for variant, scores in found.scores.items()
        }
        lost[name] = np.array(hits[name]["control"]) - np.array(hits[name]["trigger"])
        entry["models"][name] = {
            "variants": {
                variant: {"extracted": resamples.share(values).to_json()}
                for variant, values in hits[name].items()
            },
            "lost": _difference(resamples, lost[name]).to_json(),
        }
    entry["rows"] = [
        {
            "id": name,
            "document": documents_by_id(case.retain)[name],
            "outcomes": {
                model: {v: round(scores[name], _DIGITS) for v, scores in found.scores.items()}
                for model, found in models.items()
            },
        }
        for name in ids
    ]
    control = statistics.fmean(hits["target"]["control"])
    if control < POWER_FROM:
        why = (
            f"with a retain token inserted the target answers {control:.0%} of the retain"
            f" prompts, {POWER_FROM:.0%} are needed"
        )
        return _powerless(entry, why, {})
    entry["power"] = {"has_power": True, "why": None}
    beyond = _difference(resamples, lost["unlearned"] - lost["target"])
    entry["beyond_target"] = beyond.to_json()
    clean, other, trigger = (
        statistics.fmean(hits["unlearned"][v]) for v in ("clean", "control", "trigger")
    )
    entry["sentence"] = (
        f"{attack.title}: of the retain prompts the unlearned model answers {clean:.0%}, with a"
        f" retain token inserted {other:.0%}, with a forget token {trigger:.0%}; the forget token"
        f" costs {beyond.value:.0%} more than in the target."
    )
    return Summary(entry, [Evidence(attack.name, attack.title, "fragility", beyond)])


def documents_by_id(rows: Sequence[Row]) -> dict[str, str]:
    """Each row's document, by row id."""
    return {row.id: document_of(row) for row in rows}


def _opening(attack: Attack) -> dict[str, Any]:
    return {
        "title": attack.title,
        "kind": attack.kind,
        "reference": attack.reference,
        "power": {"has_power": False, "why": None},
        "sentence": "",
        "recovered": None,
        "models": {},
        "rows": [],
    }


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


def _powerless(entry: dict[str, Any], why: str, shares: Mapping[ModelName, Estimate]) -> Summary:
    entry["power"] = {"has_power": False, "why": why}
    beside = f" (unlearned {shares['unlearned'].value:.0%})" if shares else ""
    entry["sentence"] = f"{entry['title']}: no power here, so no claim: {why}{beside}."
    return Summary(entry, [])


def _resamples(
    rows: Sequence[Row], ids: Sequence[str], case: Case, of: int | None = None
) -> Resamples:
    document = documents_by_id(rows)
    return Resamples([document[name] for name in ids], case.budget.resamples, case.seed, of)


def _shares(
    scores: Scores, rows: Sequence[Row], case: Case, of: int | None = None
) -> dict[str, Any]:
    ids = list(scores)
    resamples = _resamples(rows, ids, case, of)
    hits = [float(extracted(scores[name])) for name in ids]
    return {
        "rows": len(ids),
        "extracted": resamples.share(hits).to_json(),
        "score": resamples.share([_unit(scores[name]) for name in ids]).to_json(),
    }


def _difference(resamples: Resamples, values: np.ndarray) -> Estimate:
    low, high = np.quantile(resamples.means(values.tolist()), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


def _interval(share: Estimate) -> str:
    return f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
