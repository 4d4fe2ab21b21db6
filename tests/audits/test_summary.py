"""Entries of audit.json from made-up outcomes, through to the verdict."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pytest

from expunge.audits.base import Case, Found, ModelName
from expunge.audits.budgets import Budget
from expunge.audits.catalog import ATTACKS
from expunge.audits.summary import best_of, kept_share, known_facts, summarise
from expunge.audits.verdict import judge_audit
from expunge.data.rows import Row
from expunge.evaluation.outcomes import Outcome
from expunge.evaluation.sentences import audit_sentence

BUDGET = Budget(None, None, None, 9, 1, 1, 1, 1, 1, None, 300)
FACTS = [Row(f"f{d}qa{n}", f"forget {d} {n}?", f"a{d}{n}", kind="qa") for d in range(20) for n in (0, 1)]
RETAIN = [Row(f"r{d}qa0", f"keep {d}?", f"b{d}", kind="qa") for d in range(20)]
OTHERS = [
    Row(f"n{d}qa{n}", f"forget {d} {n}?", f"c{d}{n}", kind="qa") for d in range(20, 40) for n in (0, 1)
]
CASE = Case(FACTS, FACTS, FACTS, RETAIN, RETAIN, RETAIN, OTHERS, {}, BUDGET, 0, 1e-3)


def share(rows: list[Row], part: float) -> dict[str, float]:
    """Scores of 1 for the first rows and 0 for the others."""
    return {row.id: float(n < part * len(rows)) for n, row in enumerate(rows)}


def direct(forget: float, retain: float) -> Found:
    return Found({"input": share(FACTS, forget)}, control={"input": share(RETAIN, retain)})


def verdict_of(unlearned: Found, **others: Found) -> Outcome | None:
    models: dict[ModelName, Found] = {
        "target": direct(1.0, 1.0),
        "unlearned": unlearned,
        "oracle": direct(0.05, 1.0),
    }
    evidence = list(summarise(ATTACKS["direct"], models, CASE).evidence)
    for name, found in others.items():
        attacked: dict[ModelName, Found] = {**models, "unlearned": found}
        evidence += summarise(ATTACKS[name], attacked, CASE).evidence
    return judge_audit(kept_share(models, CASE), evidence).decides.outcome


def test_the_oracle_is_forgotten_and_the_target_is_not() -> None:
    assert verdict_of(direct(0.05, 1.0)) == "forgotten"
    assert verdict_of(direct(0.0, 1.0)) == "forgotten"
    assert verdict_of(direct(1.0, 1.0)) == "not forgotten"
    assert verdict_of(direct(0.3, 1.0)) == "partly forgotten"
    assert verdict_of(direct(0.0, 0.2)) == "destroyed"
    assert verdict_of(direct(1.0, 0.2)) == "destroyed"


def test_a_refusal_that_relearning_lifts_is_not_forgetting() -> None:
    assert verdict_of(direct(0.0, 1.0), relearn=direct(0.8, 1.0)) == "not forgotten"


def test_the_worst_variant_of_each_fact_counts() -> None:
    scores = {"a": {"x": 0.0, "y": 1.0}, "b": {"x": 1.0, "y": 1.0, "z": 0.2}}
    assert best_of(scores) == {"x": (1.0, "b"), "y": (1.0, "a"), "z": (0.2, "b")}
    half = {row.id: float(n % 2) for n, row in enumerate(FACTS)}
    other = {row.id: 1 - float(n % 2) for n, row in enumerate(FACTS)}
    models: dict[ModelName, Found] = {
        "target": direct(1.0, 1.0),
        "unlearned": Found({"one": half, "two": other}),
    }
    entry = summarise(ATTACKS["quantize"], models, CASE).entry
    mine = entry["models"]["unlearned"]
    assert mine["extracted"]["value"] == 1.0
    assert {v["extracted"]["value"] for v in mine["variants"].values()} == {0.5}
    assert [row["outcomes"]["unlearned"]["by"] for row in entry["rows"][:2]] == ["two", "one"]
    assert entry["recovered"]["against"] == "zero"


def tuned(shares: Mapping[str, tuple[float, float]], kind: str = "full weights") -> Found:
    """By tuning the share of the facts at its only step, and of the retain rows then."""
    steps = {name: f"{name}, step 9" for name in shares}
    return Found(
        {steps[name]: share(FACTS, forget) for name, (forget, _) in shares.items()},
        control={steps[name]: share(RETAIN, retain) for name, (_, retain) in shares.items()},
        numbers={"tuned": kind},
        tunings={name: [step] for name, step in steps.items()},
    )


def test_the_worst_tuning_is_named_with_what_it_leaves_of_the_model() -> None:
    models: dict[ModelName, Found] = {
        "target": tuned({"rate x1": (0.8, 1.0), "rate x3": (1.0, 0.9), "rate x9": (0.2, 0.0)}),
        "unlearned": tuned({"rate x1": (0.1, 0.9), "rate x3": (0.4, 0.7), "rate x9": (0.2, 0.0)}),
    }
    entry = summarise(ATTACKS["relearn"], models, CASE).entry
    alone = {
        name: each["recovered"] and each["recovered"]["value"] for name, each in entry["tunings"].items()
    }
    # Where the attacker broke the target too, nothing is claimed of that tuning.
    assert alone == {"rate x1": 0.125, "rate x3": 0.4, "rate x9": None}
    assert entry["tunings"]["rate x9"]["retain"] == {"target": 0.0, "unlearned": 0.0}
    assert entry["recovered"]["value"] == 0.4
    assert entry["sentence"].endswith(
        "The worst tuning by itself is rate x3: it recovers 0.40 and leaves 70% of the retain rows"
        " answered."
    )


def test_an_attack_that_tuned_with_lora_says_so_with_power_and_without() -> None:
    for forget in (1.0, 0.2):
        models: dict[ModelName, Found] = {
            "target": tuned({"rate x1": (forget, 1.0)}, "lora"),
            "unlearned": tuned({"rate x1": (0.6, 1.0)}, "lora"),
        }
        summary = summarise(ATTACKS["relearn"], models, CASE)
        assert summary.entry["power"]["has_power"] is (forget == 1.0)
        assert summary.entry["sentence"].startswith("Held-out relearning with LoRA: ")
        if forget == 1.0:
            said = audit_sentence(judge_audit(None, summary.evidence).decides)
            assert said.startswith("Held-out relearning with LoRA: 60%")


def test_what_is_shown_beside_an_attack_gives_it_no_power() -> None:
    weak = dict.fromkeys((row.id for row in FACTS), 0.0)
    found = Found({"input": share(FACTS, 1.0), "cloze": weak}, ["input"])
    models: dict[ModelName, Found] = {"target": found, "unlearned": found}
    entry = summarise(ATTACKS["paraphrase"], models, CASE).entry
    assert not entry["power"]["has_power"]
    assert entry["models"]["target"]["variants"]["input"]["extracted"]["value"] == 1.0
    assert entry["models"]["target"]["extracted"]["value"] == 0.0


@pytest.mark.parametrize(
    ("target", "oracle", "why"),
    [
        (0.4, None, "it gets 40% of the facts from the target, 50% are needed"),
        (0.6, 0.5, "it gets 60% from the target and 50% from the oracle; 20% must lie between"),
    ],
)
def test_no_power_no_claim(target: float, oracle: float | None, why: str) -> None:
    models: dict[ModelName, Found] = {"target": direct(target, 1.0), "unlearned": direct(0.0, 1.0)}
    if oracle is not None:
        models["oracle"] = direct(oracle, 1.0)
    summary = summarise(ATTACKS["direct"], models, CASE)
    assert summary.evidence == []
    assert summary.entry["recovered"] is None
    assert summary.entry["power"] == {"has_power": False, "why": why}
    assert summary.entry["models"]["target"]["extracted"]["value"] == pytest.approx(target)


def membership(shift: float, seed: int) -> Found:
    draw = random.Random(seed)
    scores = {row.id: draw.gauss(shift, 1) for row in FACTS}
    scores |= {row.id: draw.gauss(0, 1) for row in OTHERS}
    return Found({"loss": scores, "zlib": dict.fromkeys(scores, 0.0)})


def mia(unlearned: float, oracle: float | None, rows: Case = CASE) -> tuple[Any, Any]:
    models: dict[ModelName, Found] = {
        "target": membership(4.0, 1),
        "unlearned": membership(unlearned, 2),
    }
    if oracle is not None:
        models["oracle"] = membership(oracle, 3)
    summary = summarise(ATTACKS["membership"], models, rows)
    return summary.entry, summary.evidence


def test_membership_is_two_sided_about_its_reference() -> None:
    entry, evidence = mia(-2.0, None)
    assert entry["power"]["has_power"]
    assert [each.title for each in evidence] == ["Membership inference by loss"]  # zlib has no power
    assert "by loss, the score furthest from chance, AUC" in entry["sentence"]
    assert evidence[0].figure.value < -0.2
    assert evidence[0].figure.high < 0
    assert evidence[0].chance == pytest.approx(entry["chance"]["loss"], abs=1e-6)
    assert evidence[0].chance <= 1e-3
    entry, evidence = mia(-2.0, -2.0)
    assert "by loss, the score furthest from the oracle's, AUC" in entry["sentence"]
    assert abs(evidence[0].figure.value) < 0.1
    assert judge_audit(None, mia(3.0, 0.0)[1]).decides.outcome == "partly forgotten"
    assert len(entry["rows"]) == len(FACTS) + len(OTHERS)
    assert sum(row["member"] for row in entry["rows"]) == len(FACTS)


def few_case(documents: int) -> Case:
    facts = FACTS[: 2 * documents]
    return Case(**{**vars(CASE), "facts": facts, "members": facts, "forget": facts})


def outcome(rows: Collection[str], names: Collection[str]) -> Found:
    return Found(
        {"input": {name: float(name in names) for name in rows}},
        control={"input": share(RETAIN, 1.0)},
    )


@pytest.mark.parametrize("documents", [1, 3, 5, 6])
def test_of_few_documents_facts_are_counted_and_no_interval_stands_in(documents: int) -> None:
    case = few_case(documents)
    ids = [row.id for row in case.facts]

    def judged(unlearned: list[str], oracle: list[str] | None) -> tuple[Any, Any]:
        models: dict[ModelName, Found] = {
            "target": outcome(ids, ids),
            "unlearned": outcome(ids, unlearned),
        }
        if oracle is not None:
            models["oracle"] = outcome(ids, oracle)
        summary = summarise(ATTACKS["direct"], models, case, set(ids))
        return judge_audit(kept_share(models, case), summary.evidence), summary.entry

    found, entry = judged([], None)
    assert found.decides.outcome == "forgotten"
    assert entry["recovered"] == {"value": 0.0, "low": 0.0, "high": 0.0, "against": "zero"}
    one, entry = judged(ids[:1], None)
    few = documents <= 5
    assert one.decides.outcome == (
        "not forgotten" if documents == 1 else "partly forgotten" if few else "forgotten"
    )
    assert (f"1 of the {len(ids)} facts that the target knows" in audit_sentence(one.decides)) is few
    assert entry["sentence"].startswith(f"Direct questions: {'1 of' if few else '8%'}")
    # What the oracle gives too was guessed; of what it does not, one is enough.
    assert judged(ids[:1], ids[:1])[0].decides.outcome == "forgotten"
    if few:
        swapped, entry = judged(ids[1:2], ids[:1])
        assert swapped.decides.outcome in ("partly forgotten", "not forgotten")
        assert entry["recovered"]["value"] == pytest.approx(1 / (len(ids) - 1), abs=1e-6)


def test_a_fact_that_no_attack_gets_from_the_target_does_not_count() -> None:
    case = few_case(3)
    ids = [row.id for row in case.facts]
    models: dict[ModelName, Found] = {
        "target": outcome(ids, ids[:4]),
        "unlearned": outcome(ids, ids[4:]),
    }
    for known, got in ((None, 0), (set(ids[:4]), 0), (set(ids[:5]), 1)):
        (evidence,) = summarise(ATTACKS["direct"], models, case, known).evidence
        assert evidence.count == (got, 4 if got == 0 else 5)
    assert known_facts([models["target"], models["unlearned"]]) == set(ids)


@pytest.mark.parametrize(("documents", "texts", "why"), [
    (1, 38, "38 non-members are too few to place 1 among them; 39 are needed"),
    (1, 60, None), (3, 20, None), (5, 4, None),
])  # fmt: skip
def test_few_documents_are_judged_by_their_places(documents: int, texts: int, why: str | None) -> None:
    others = [Row(f"n{d}qa0", "forget", "it", kind="qa") for d in range(texts)]
    facts = [replace(row, input="forget", output="it") for row in FACTS[: 2 * documents]]
    case = Case(**{**vars(CASE), "members": facts, "forget": facts, "nonmembers": others})

    def at(place: float) -> Found:
        scores = {row.id: float(n) for n, row in enumerate(others)}
        scores |= {row.id: place * texts - 0.5 for row in facts}
        return Found({"loss": scores, "zlib": dict.fromkeys(scores, 0.0)})

    verdicts = {}
    for place in (0.0, 0.5, 1.0):
        models: dict[ModelName, Found] = {"target": at(1.0), "unlearned": at(place)}
        summary = summarise(ATTACKS["membership"], models, case)
        if why is not None:
            assert summary.entry["power"] == {"has_power": False, "why": why}
            assert list(summary.evidence) == []
            continue
        verdicts[place] = judge_audit(None, summary.evidence).decides.outcome
        assert summary.entry["models"]["unlearned"]["variants"]["loss"]["auc"]["low"] is None
        assert f" of {texts + 1}, 1 the most familiar (target 1" in summary.entry["sentence"]
    if why is None:
        assert verdicts == {0.0: "over-unlearned", 0.5: None, 1.0: "partly forgotten"}


def test_where_words_alone_separate_membership_is_no_evidence() -> None:
    foreign = [Row(row.id, "something else entirely", "here", kind="qa") for row in OTHERS]
    case = Case(**{**vars(CASE), "nonmembers": foreign})
    entry, evidence = mia(3.0, None, case)
    assert entry["blind"]["separates"]
    assert evidence == []
    assert (
        "no power here, so no claim: words alone separate members from non-members" in entry["sentence"]
    )


def fragile(control: float, trigger: float) -> Found:
    return Found(
        {
            "clean": share(RETAIN, 1.0),
            "control": share(RETAIN, control),
            "trigger": share(RETAIN, trigger),
        }
    )


@pytest.mark.parametrize(
    ("target", "unlearned", "beyond", "verdict"),
    [
        ((1.0, 1.0), (1.0, 0.4), 0.6, "over-unlearned"),
        ((1.0, 0.4), (1.0, 0.4), 0.0, None),
        ((1.0, 1.0), (0.4, 0.4), 0.0, None),
        ((0.4, 0.4), (0.4, 0.0), None, None),
    ],
)
def test_a_trigger_costs_what_the_control_and_the_target_do_not(
    target: tuple[float, float],
    unlearned: tuple[float, float],
    beyond: float | None,
    verdict: Outcome | None,
) -> None:
    models: Mapping[ModelName, Found] = {
        "target": fragile(*target),
        "unlearned": fragile(*unlearned),
    }
    summary = summarise(ATTACKS["trigger"], models, CASE)
    assert summary.entry["power"]["has_power"] is (beyond is not None)
    if beyond is not None:
        assert summary.entry["beyond_target"]["value"] == pytest.approx(beyond)
    assert judge_audit(None, summary.evidence).decides.outcome == verdict


def test_a_form_that_fits_no_fact_is_left_out() -> None:
    found = Found({"input": share(FACTS, 1.0), "cloze": share(FACTS, 1.0), "few-shot": {}}, ["input"])
    models: dict[ModelName, Found] = {"target": found, "unlearned": found}
    entry = summarise(ATTACKS["paraphrase"], models, CASE).entry
    assert entry["power"]["has_power"]
    assert list(entry["models"]["target"]["variants"]) == ["input", "cloze"]


@pytest.mark.parametrize(("documents", "most"), [(5, 0.45), (20, 0.0)])
def test_documents_that_the_draw_left_out_are_in_the_bound(documents: int, most: float) -> None:
    """Members, which other attacks ask, are of all documents."""
    facts = FACTS[: 2 * documents]
    case = Case(**{**vars(CASE), "facts": facts})
    nothing, everything = (Found({"input": share(facts, part)}) for part in (0.0, 1.0))
    models: dict[ModelName, Found] = {"target": everything, "unlearned": nothing}
    recovered = summarise(ATTACKS["paraphrase"], models, case).entry["recovered"]
    assert recovered["value"] == recovered["low"] == 0
    # 9 of 20 documents leave 0 of 5 drawn ones likely (hypergeometric, 2.5%).
    assert recovered["high"] == pytest.approx(most)
