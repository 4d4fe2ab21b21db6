"""Attacks by tuning: every rate, LoRA where memory is short, what the attacker leaves of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.audits import auditing, inputs, memory, tuning
from expunge.audits.attacks import benign, relearn
from expunge.audits.base import Attack, Case, Found, Tuned
from expunge.audits.budgets import BUDGETS, Budget, BudgetName
from expunge.audits.catalog import ATTACKS
from expunge.audits.subject import Subject
from expunge.audits.tuning import tunings_of
from expunge.data.rows import Row, as_rows
from expunge.data.sampling import EpochBatches
from expunge.data.tokenization import TextPolicy
from expunge.models.loading import check_model
from expunge.runs.memory_parts import WEIGHTS, Phase

Cli = Callable[..., tuple[int, str, str]]
SMALL = Budget(
    facts=None, retain=8, nonmembers=None, tokens=24, steps=4, measures=2, tuning_rows=4, folds=2,
    samples=3, layers=2, resamples=50, rates=(1.0, 3.0),
)  # fmt: skip


@pytest.fixture
def rows(
    forget_rows: list[dict[str, str]], retain_rows: list[dict[str, str]]
) -> dict[str, tuple[Row, ...]]:
    return {
        "forget": as_rows(forget_rows, "forget").rows,
        "retain": as_rows(retain_rows, "retain").rows,
    }


def case_of(rows: dict[str, tuple[Row, ...]], budget: Budget, tuned: Tuned = "full") -> Case:
    facts, kept = rows["forget"], rows["retain"]
    return Case(facts, facts, facts, kept, kept, kept, [], {}, budget, 0, 5e-3, tuned)


@pytest.fixture
def subject(memorised_dir: Path) -> Subject:
    checked = check_model(str(memorised_dir))
    return Subject("target", checked, "float32", "cpu", TextPolicy(checked.context), 64, 24)


def found_by(attack: Attack, subject: Subject, case: Case) -> Found:
    return attack.run(subject, case, lambda *_: None)


@pytest.mark.parametrize(
    ("budget", "factors", "others"),
    [
        ("quick", [1, 3], []),
        ("standard", [0.3, 1, 3], ["questions only", "documents only"]),
        ("thorough", [0.1, 0.3, 1, 3], ["LoRA", "questions only", "documents only"]),
    ],
)
def test_the_budget_says_which_rates_are_tried(
    budget: BudgetName,
    factors: list[float],
    others: list[str],
    rows: dict[str, tuple[Row, ...]],
) -> None:
    case = case_of(rows, BUDGETS[budget])
    tunings = tunings_of(case, apart=case.budget.apart)
    names = [f"rate x{factor:g}" for factor in factors]
    assert [each.name for each in tunings] == names + others
    rates = {each.name: each.learning_rate / case.learning_rate for each in tunings}
    expected = dict(zip(names, factors, strict=True)) | dict.fromkeys(others, 1.0)
    if "LoRA" in others:
        expected["LoRA"] = 10.0
    assert rates == pytest.approx(expected)
    assert {each.name for each in tunings if each.tuned == "lora"} == {"LoRA"} & set(others)
    # With LoRA in the place of every weight each rate is ten times as high, and no other LoRA is left.
    low = tunings_of(replace(case, tuned="lora"), apart=case.budget.apart)
    assert {each.tuned for each in low} == {"lora"}
    assert {each.name: each.learning_rate / case.learning_rate for each in low} == pytest.approx(
        {name: 10 * factor for name, factor in expected.items() if name != "LoRA"}
    )


def test_every_tuning_takes_the_same_batches_and_is_measured_with_what_is_left(
    subject: Subject, rows: dict[str, tuple[Row, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[tuple[str, ...]]] = []

    class Watched(EpochBatches):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            taken.append([])

        def at(self, step: int) -> Any:
            batch = super().at(step)
            taken[-1].append(tuple(batch.row_ids))
            return batch

    monkeypatch.setattr(tuning, "EpochBatches", Watched)
    case = case_of(rows, replace(SMALL, rates=(0.3, 1.0), lora=True, apart=True))
    told: list[tuple[int, int]] = []
    found = relearn.run(subject, case, lambda *done: told.append(done))
    assert told == [(step, 2 * 5 * 4) for step in range(1, 41)]
    kinds = {row.id: row.kind for row in case.facts}
    for fold in (taken[:5], taken[5:]):
        assert fold[0] == fold[1] == fold[2]
        assert len(fold[0]) == 4
        for tuned, kind in ((fold[3], "qa"), (fold[4], "sc")):
            assert {kinds[row] for batch in tuned for row in batch} == {kind}
    shown = [{row for batch in part for row in batch} for part in (taken[0], taken[5])]
    assert not shown[0] & shown[1]
    names = ["rate x0.3", "rate x1", "LoRA", "questions only", "documents only"]
    assert found.tunings == {name: [f"{name}, step 2", f"{name}, step 4"] for name in names}
    assert set(found.scores) == {step for steps in found.tunings.values() for step in steps}
    assert {frozenset(scores) for scores in found.scores.values()} == {frozenset(kinds)}
    assert set(found.control) == {steps[-1] for steps in found.tunings.values()}
    for scores in found.control.values():
        assert set(scores) == {row.id for row in case.retain}
    # Each rate is the saved model's alone: without the others it gives the same.
    alone = found_by(relearn.ATTACK, subject, case_of(rows, replace(SMALL, rates=(1.0,))))
    assert {name: found.scores[name] for name in alone.scores} == alone.scores


def test_rows_of_one_kind_are_not_tuned_on_apart(
    subject: Subject, rows: dict[str, tuple[Row, ...]]
) -> None:
    questions = tuple(row for row in rows["forget"] if row.kind == "qa")
    case = case_of({**rows, "forget": questions}, replace(SMALL, apart=True))
    assert list(relearn.run(subject, case, lambda *_: None).tunings) == ["rate x1", "rate x3"]


def test_an_attacker_who_broke_the_model_is_seen(
    subject: Subject, rows: dict[str, tuple[Row, ...]]
) -> None:
    case = case_of(rows, replace(SMALL, rates=(0.01, 1e4)))
    for attack in (relearn, benign):
        control = attack.run(subject, case, lambda *_: None).control
        assert set(control["rate x0.01, step 4"].values()) == {1.0}
        assert max(control["rate x10000, step 4"].values()) < 0.5
    assert set(control["step 0"].values()) == {1.0}


def test_lora_tunes_the_model_and_leaves_nothing_of_it(
    subject: Subject, rows: dict[str, tuple[Row, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in subject.reader.model.state_dict().items()}
    logits: list[torch.Tensor] = []
    tune = tuning.tuned

    def watched(model: Any, *given: Any, **options: Any) -> Any:
        ids = torch.tensor([[5, 6, 7]])
        frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
            yield from tune(model, *given, **options)
            logits.append(model(input_ids=ids).logits)
        for name, value in model.named_parameters():
            if "lora_" not in name:
                assert torch.equal(value, frozen[name])
                assert not value.requires_grad

    monkeypatch.setattr(tuning, "tuned", watched)
    found = found_by(benign.ATTACK, subject, case_of(rows, replace(SMALL, rates=(1.0,)), "lora"))
    assert found.numbers["tuned"] == "lora"
    assert found.numbers["learning_rates"] == {"rate x1": pytest.approx(0.05)}
    assert float((logits[0] - logits[1]).abs().max()) > 0.1
    after = subject.reader.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def audit(
    run_cli: Cli,
    memorised_dir: Path,
    nudged_dir: Path,
    row_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Cli:
    for module in (auditing, inputs):
        monkeypatch.setattr(module, "BUDGETS", {"quick": SMALL})

    def call(*options: object) -> tuple[int, str, str]:
        return run_cli(
            *("audit", nudged_dir, "--original", memorised_dir, "--forget", row_files["forget"]),
            *("--retain", row_files["retain"], "--device", "cpu", "--quiet", *options),
        )

    return call


@pytest.mark.slow
def test_where_memory_is_short_every_model_is_tuned_with_lora(
    audit: Cli, memorised_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of so small a model an adapter takes more than every weight: the sizes are made up.
    def made_up(_: Any, dtype: str, kind: str, sizes: memory.Sizes, tuned: Tuned) -> list[Phase]:
        takes = {"full": 100, "lora": 50}[tuned] - 5 * (sizes.batch_size == 1)
        return [Phase("ask", {"all": 20}, {}), Phase("tune", {"all": takes}, {})]

    monkeypatch.setattr(memory, "audit_phases", made_up)
    reports = {}
    for free, expected in ((100, "full"), (99, "lora")):
        monkeypatch.setattr(inputs, "free_memory", lambda _, free=free: free)
        output = tmp_path / f"{expected}.json"
        code, _, err = audit(
            *("--attacks", "relearn", "--dtype", "bfloat16", "--learning-rate", 5e-3),
            *("--output", output),
        )
        assert code == 0, err
        reports[expected] = report = json.loads(output.read_text())
        assert report["settings"]["tuning"] == expected
        dtype = "float32" if expected == "full" else "bfloat16"
        assert {each["tuned_in"] for each in report["models"].values()} == {dtype}
        attack = report["requests"][0]["attacks"]["relearn"]
        assert ("with LoRA: " in attack["sentence"]) is (expected == "lora")
        told = {each["numbers"]["tuned"] for each in attack["models"].values()}
        assert told == {"lora" if expected == "lora" else "full weights"}
    monkeypatch.setattr("expunge.audits.subject.load_model", lambda *_: pytest.fail("was loaded"))
    for free, options, mend in (
        (99, ("--tuning", "full"), "use --tuning lora"),
        (47, (), "use --batch-size 1"),
        (9, (), "use a machine with more memory"),
    ):
        monkeypatch.setattr(inputs, "free_memory", lambda _, free=free: free)
        code, _, err = audit("--attacks", "relearn", *options)
        assert (code, err.count("\n")) == (2, 1)
        assert "GiB to tune, " in err
        assert err.endswith(f"free on cpu; {mend}\n")


def test_every_weight_is_planned_for_with_16_bytes_and_an_adapter_with_what_it_has(
    subject: Subject,
) -> None:
    weights = sum(p.numel() for p in subject.reader.model.parameters())
    layers = subject.checked.layout.linears()
    maps = [subject.reader.model.get_submodule(name) for name in layers]
    adapter = sum(32 * (each.in_features + each.out_features) for each in maps)
    sizes = memory.Sizes(30, 30, 1, SMALL)
    expected_of: dict[Tuned, int] = {"full": 16 * weights, "lora": 16 * adapter}
    for tuned, expected in expected_of.items():
        ask, tune = memory.audit_phases(subject.checked, "float32", "cpu", sizes, tuned)
        assert tune.parts[memory.TUNED] == expected
        assert ask.parts[WEIGHTS] == 4 * weights
    none = replace(sizes, longest_tuned=0)
    assert len(memory.audit_phases(subject.checked, "bfloat16", "cpu", none, "full")) == 1


@pytest.mark.slow
def test_what_was_tuned_in_another_way_is_not_read(
    audit: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, str]] = []

    def counted(attack: Attack) -> Attack:
        def run(subject: Any, case: Case, advance: Any) -> Found:
            ran.append((subject.name, attack.name))
            return attack.run(subject, case, advance)

        return replace(attack, run=run)

    names = ("direct", "benign")
    monkeypatch.setattr(inputs, "ATTACKS", {name: counted(ATTACKS[name]) for name in names})
    options = ("--cache", tmp_path / "kept")
    unlearned = [("unlearned", name) for name in names]
    for more, again in (
        (("--tuning", "full"), [("target", "direct"), ("target", "benign")]),
        (("--tuning", "full"), []),
        (("--tuning", "lora"), [("target", "benign")]),  # asking alone tunes nothing
    ):
        ran.clear()
        assert audit(*options, *more)[0] == 0
        assert ran == again + unlearned
    # Other factors are another budget.
    for module in (auditing, inputs):
        monkeypatch.setattr(module, "BUDGETS", {"quick": replace(SMALL, rates=(1.0, 2.0))})
    ran.clear()
    assert audit(*options, "--tuning", "full")[0] == 0
    assert ("target", "benign") in ran
