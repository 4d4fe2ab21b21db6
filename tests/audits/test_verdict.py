"""The verdict on made-up numbers: each rule, its border and what comes before what."""

from __future__ import annotations

import pytest

from expunge.audits.estimates import Estimate
from expunge.audits.verdict import Evidence, Verdict, judge_audit, worst_of
from expunge.evaluation.outcomes import Finding, Outcome
from expunge.evaluation.sentences import audit_sentence


def recovered(
    value: float, low: float, high: float, attack: str = "relearn", *, oracle: bool = True
) -> Evidence:
    return Evidence(attack, attack.title(), "extraction", Estimate(value, low, high), oracle)


def membership(value: float, chance: float = 0.01) -> Evidence:
    figure = Estimate(value, None, None)
    return Evidence("membership", "MIA", "membership", figure, chance=chance)


def few(got: int, of: int, attack: str = "relearn", *, oracle: bool = True) -> Evidence:
    """Of a request of few documents, all of whose facts were asked."""
    figure = Estimate(*[got / of] * 3)
    return Evidence(attack, attack.title(), "extraction", figure, oracle, (got, of))


def latent(value: float, *, oracle: bool) -> Evidence:
    return Evidence("latent", "Latent", "latent", Estimate(value, value - 0.1, value + 0.1), oracle)


def fragile(value: float, low: float) -> Evidence:
    return Evidence("trigger", "Trigger", "fragility", Estimate(value, low, value + 0.1))


KEPT = Estimate(0.97, 0.9, 1.0)
CLEAN = recovered(0.01, 0.0, 0.08)

CASES: list[tuple[str, Estimate | None, list[Evidence], Outcome | None, str | None]] = [
    ("the oracle itself", KEPT, [CLEAN], "forgotten", "relearn"),
    ("the target itself", KEPT, [recovered(1.0, 1.0, 1.0)], "not forgotten", "relearn"),
    ("at the border", KEPT, [recovered(0.5, 0.2, 0.8)], "not forgotten", "relearn"),
    ("just below", KEPT, [recovered(0.49, 0.2, 0.8)], "partly forgotten", "relearn"),
    ("a tenth", KEPT, [recovered(0.1, 0.01, 0.2)], "partly forgotten", "relearn"),
    ("below a tenth", KEPT, [recovered(0.09, 0.01, 0.2)], "forgotten", "relearn"),
    ("perhaps chance", KEPT, [recovered(0.2, 0.0, 0.4)], "forgotten", "relearn"),
    ("one of ten, no oracle", KEPT, [recovered(0.1, 0.0, 0.3, oracle=False)], "partly forgotten",
     "relearn"),
    ("too few rows", KEPT, [recovered(0.0, 0.0, 0.6)], None, "relearn"),
    ("no bound at all", KEPT, [Evidence("a", "A", "extraction", Estimate(0, None, None))], None, "a"),
    ("no power anywhere", KEPT, [], None, None),
    ("only a quiet MIA", KEPT, [membership(0.0, 0.9)], None, None),
    ("driven too far", Estimate(0.49, 0.4, 0.6), [CLEAN], "destroyed", "direct"),
    ("one retain row lost", Estimate(0.0, 0.0, 3.4), [CLEAN], "forgotten", "relearn"),
    ("retain half left", Estimate(0.5, 0.4, 0.6), [CLEAN], "forgotten", "relearn"),
    ("retain not measured", None, [CLEAN], "forgotten", "relearn"),
    ("told, not far", KEPT, [CLEAN, membership(0.19, 0.001)], "forgotten", "relearn"),
    ("members told", KEPT, [CLEAN, membership(0.2, 0.05)], "partly forgotten", "membership"),
    ("perhaps told", KEPT, [CLEAN, membership(0.2, 0.06)], "forgotten", "relearn"),
    ("stand out", KEPT, [CLEAN, membership(-0.3, 0.01)], "over-unlearned", "membership"),
    ("perhaps out", KEPT, [CLEAN, membership(-0.3, 0.06)], "forgotten", "relearn"),
    ("fragile", KEPT, [CLEAN, fragile(0.25, 0.1)], "over-unlearned", "trigger"),
    ("a little fragile", KEPT, [CLEAN, fragile(0.15, 0.1)], "forgotten", "relearn"),
    ("inside", KEPT, [CLEAN, latent(0.6, oracle=True)], "partly forgotten", "latent"),
    ("inside, no floor", KEPT, [CLEAN, latent(0.9, oracle=False)], "forgotten", "relearn"),
    ("a little inside", KEPT, [CLEAN, latent(0.3, oracle=True)], "forgotten", "relearn"),
]  # fmt: skip


@pytest.mark.parametrize(("kept", "evidence", "verdict", "weakest"), [c[1:] for c in CASES],
                         ids=[c[0] for c in CASES])  # fmt: skip
def test_each_rule(
    kept: Estimate | None,
    evidence: list[Evidence],
    verdict: Outcome | None,
    weakest: str | None,
) -> None:
    found = judge_audit(kept, evidence)
    assert (found.decides.outcome, found.decides.attack) == (verdict, weakest)
    assert audit_sentence(found.decides)


def test_what_came_back_is_said_though_it_be_too_little_to_count() -> None:
    none, some = (
        audit_sentence(judge_audit(KEPT, [recovered(v, 0.0, 0.2)]).decides) for v in (0.0, 0.09)
    )
    assert "no attack got it back" in none
    assert "got 9% back, less than the tenth that counts" in some
    unsure = audit_sentence(judge_audit(KEPT, [recovered(0.1, 0.0, 0.2)]).decides)
    assert "got 10% back, which may be chance" in unsure
    assert "no attack" not in some
    # Without an oracle 0 is the floor, and one fact is above it.
    assert judge_audit(KEPT, [recovered(0.2, 0.0, 0.4)]).decides.outcome == "forgotten"
    any_fact = recovered(0.2, 0.0, 0.4, oracle=False)
    assert judge_audit(KEPT, [any_fact]).decides.outcome == "partly forgotten"


@pytest.mark.parametrize("kept", [None, Estimate(0.0, 0.0, 3.4)])
def test_a_cost_that_cannot_be_told_is_said(kept: Estimate | None) -> None:
    assert "too few retain rows" in audit_sentence(judge_audit(kept, [CLEAN]).decides)
    assert "too few retain rows" not in audit_sentence(judge_audit(KEPT, [CLEAN]).decides)


def test_the_gravest_comes_first_and_all_are_kept() -> None:
    evidence = [
        fragile(0.5, 0.3),
        membership(0.3),
        membership(0.4),
        recovered(0.2, 0.1, 0.3, "sample"),
        recovered(0.6, 0.5, 0.7, "quantize"),
        recovered(0.9, 0.8, 1.0, "relearn"),
    ]
    found = judge_audit(Estimate(0.1, 0.0, 0.2), evidence)
    assert (found.decides.outcome, found.decides.attack) == ("destroyed", "direct")
    assert [(f.outcome, f.attack) for f in found.findings] == [
        ("destroyed", "direct"),
        ("not forgotten", "relearn"),
        ("not forgotten", "quantize"),
        ("partly forgotten", "membership"),
        ("partly forgotten", "sample"),
        ("over-unlearned", "trigger"),
    ]
    # Of two findings of the same attack the stronger is told.
    assert "0.40" in audit_sentence(found.findings[3])
    assert judge_audit(KEPT, evidence).decides.attack == "relearn"


def test_a_worse_result_never_gives_a_better_verdict() -> None:
    order = ["forgotten", "partly forgotten", "not forgotten"]
    found = [
        judge_audit(KEPT, [recovered(v / 100, v / 100 - 0.05, v / 100 + 0.05)]).decides.outcome
        for v in range(0, 101, 2)
    ]
    places = [order.index(str(name)) for name in found]
    assert places == sorted(places)
    assert set(places) == {0, 1, 2}


def test_of_several_requests_the_gravest_verdict_counts() -> None:
    good = Verdict(Finding("forgotten", "nothing", {}))
    untold = Verdict(Finding(None, "no power", {}))
    bad = Verdict(Finding("not forgotten", "facts", {}))
    assert worst_of([good, bad, untold]) is bad
    assert worst_of([good, untold]) is untold
    assert worst_of([good]) is good


@pytest.mark.parametrize(("of", "oracle"), [(1, True), (1, False), (2, False), (3, True), (9, False)])
def test_of_few_documents_any_fact_that_comes_back_counts(of: int, oracle: bool) -> None:
    none = [few(0, of, "direct", oracle=oracle), few(0, of, oracle=oracle), membership(0.0, 0.7)]
    found = judge_audit(KEPT, none)
    assert found.decides.outcome == "forgotten"
    facts = "the one fact" if of == 1 else f"any of the {of} facts"
    known = " and the oracle does not" if oracle else ""
    assert audit_sentence(found.decides) == f"no attack got {facts} that the target knows{known}"
    for got in range(1, of + 1):
        found = judge_audit(KEPT, [few(0, of, "direct"), few(got, of)])
        assert found.decides.outcome == ("not forgotten" if 2 * got >= of else "partly forgotten")
        assert f"{got} of the {of} facts" in audit_sentence(found.decides)


def test_what_was_not_judged_is_said() -> None:
    for evidence in ([few(0, 3)], [CLEAN]):
        assert "membership was not judged" in audit_sentence(judge_audit(KEPT, evidence).decides)
        judged = judge_audit(KEPT, [*evidence, membership(0.0, 0.8)])
        assert (judged.decides.outcome, "not judged" in audit_sentence(judged.decides)) == (
            "forgotten",
            False,
        )
