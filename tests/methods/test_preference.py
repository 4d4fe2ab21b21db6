"""IDK with DPO, and AltPO: one loss, two kinds of preferred outputs, and how they meet their rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from compared import Compared
from conftest import refusal
from expunge.data.batches import collate
from expunge.data.rows import Row, as_rows
from expunge.data.tokenization import TextPolicy, encode_rows
from expunge.maths.losses import dpo, npo
from expunge.methods.alt_po import AltPO
from expunge.methods.base import Context
from expunge.methods.counterfactuals import other_answers
from expunge.methods.idk_dpo import IDKDPO
from expunge.methods.preference import encode_beside, refusing

Contexts = Callable[..., Context]
GAINED, LOST = torch.tensor([0.0, 3.0, -2.0]), torch.tensor([0.0, -50.0, 40.0])


def test_dpo_against_its_definition() -> None:
    beta = 0.4
    slow = [
        -2 / beta * math.log(1 / (1 + math.exp(-beta * (a - b))))
        for a, b in zip(GAINED.tolist(), LOST.tolist(), strict=True)
    ]
    assert float(dpo(GAINED, LOST, beta)) == pytest.approx(sum(slow) / 3, rel=1e-5)


def test_at_the_reference_it_is_log_2_by_scale_and_pulls_alike_at_every_beta() -> None:
    for beta in (0.05, 1.0):
        gained, lost = (torch.zeros(2, requires_grad=True) for _ in range(2))
        loss = dpo(gained, lost, beta)
        assert float(loss.detach()) == pytest.approx(2 / beta * math.log(2))
        loss.backward()
        assert gained.grad is not None
        assert lost.grad is not None
        assert gained.grad.tolist() == pytest.approx([-0.5, -0.5])
        assert lost.grad.tolist() == pytest.approx([0.5, 0.5])


def test_without_a_gain_it_is_npo() -> None:
    found = dpo(torch.zeros(3), LOST, 0.3)
    assert float(found) == pytest.approx(float(npo(LOST, torch.zeros(3), 0.3)))


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("method", [IDKDPO, AltPO])
def test_both_outputs_are_against_the_model_from_before(
    method: Any,
    parameters: str,
    make_context: Contexts,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
    tokenizer: Any,
) -> None:
    made = method(parameters=parameters, rank=4, beta=0.3, retain_weight=0.0)
    sides = (as_rows(forget_rows, "forget").rows, as_rows(retain_rows, "retain").rows)
    rows = made.preferred(*sides, 0)
    assert [row.id for row in rows] == [row.id for row in sides[0]]
    preferred = encode_rows(rows, tokenizer, TextPolicy(128), eos=True)
    case = Compared(made, replace(make_context(), preferred=preferred), len(tokenizer))
    term = float(case.terms.forget.detach())

    def gain() -> torch.Tensor:
        """By how much each row's content is likelier than before, float64."""
        mask = case.forget.mask("content")[:, 1:]
        targets = case.forget.input_ids[:, 1:][mask][:, None]
        now, before = (
            case.counted("forget", "content", before=when).gather(1, targets)[:, 0]
            for when in (False, True)
        )
        rows = mask.nonzero()[:, 0]
        return torch.zeros(len(mask), dtype=torch.float64).index_add(0, rows, now - before)

    lost = gain()
    case.forget = collate(preferred, case.forget.indices, 1)
    margins = (gain() - lost).tolist()
    assert min(map(abs, margins)) > 1e-3
    expected = [2 / 0.3 * math.log(1 + math.exp(-0.3 * margin)) for margin in margins]
    assert term == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_a_refusal_takes_every_outputs_place() -> None:
    rows = [Row("a", "Who?", "Ada.", kind="qa"), Row("b", "It was", "long ago.")]
    found = IDKDPO(refusal="Never heard of it.").preferred(rows, (), 0)
    assert [(row.id, row.input, row.output) for row in found] == [
        ("a", "Who?", "Never heard of it."),
        ("b", "It was", "Never heard of it."),
    ]
    assert "--method.refusal" in refusal(lambda: IDKDPO(refusal=""))


def test_windows_meet_those_of_the_same_row_and_the_last_has_the_refusal(tokenizer: Any) -> None:
    policy = TextPolicy(24, long_rows="window")
    rows = [
        Row("long", "Ada was born in a small house near the river of", "Paris. " * 20),
        Row("longer", "Ben was born in a small house near the river of " * 5, "Oslo."),
        Row("short", "What is the number of Ada?", "900.", kind="qa"),
    ]
    examples = encode_rows(rows, tokenizer, policy, eos=False)
    assert [len([e for e in examples if e.row_id == row.id]) > 2 for row in rows] == [
        True,
        True,
        False,
    ]
    found = encode_beside(examples, refusing(rows, "No idea"), tokenizer, policy)
    assert [e.row_id for e in found] == [e.row_id for e in examples]
    for row in rows:
        mine = [e for e in found if e.row_id == row.id]
        assert any(mine[-1].answer_mask)
        assert mine[-1].input_ids[-1] == tokenizer.eos_token_id
    longer = [e for e in found if e.row_id == "longer"]
    assert not any(longer[0].answer_mask)
    assert longer[0].input_ids == next(e for e in examples if e.row_id == "longer").input_ids
    assert encode_beside(examples, [], tokenizer, policy) == []
    assert encode_beside(examples[-1:], refusing(rows, "No idea"), tokenizer, policy) == found[-1:]


FORGET = [
    Row("q1", "Where was Ada Roe born?", "Ada Roe was born in Torun in 1961.", kind="qa"),
    Row("q2", "Did she marry?", "yes", kind="qa"),
    Row("d", "Ada Roe of Torun", "sold 12 lanterns."),
]
OTHERS = [
    Row(f"r{n}", f"Where was {name} born?", f"{name} was born in {place} in {1900 + n}.", kind="qa")
    for n, (name, place) in enumerate([("Ben Doe", "Lodz"), ("Cy Poe", "Brno")] * 10)
] + [Row(f"y{n}", "Did he marry?", "yes" if n else "no", kind="qa") for n in range(20)]


def test_an_alternative_answers_the_same_question_in_the_same_form() -> None:
    first, second, third = other_answers(FORGET, OTHERS, 0)
    assert first.input == FORGET[0].input
    words = first.output.rstrip(".").split()
    assert words[:5] == ["Ada", "Roe", "was", "born", "in"]  # of the question, or in every answer
    assert words[5] in {"Ben", "Doe", "Lodz", "Cy", "Poe", "Brno"}  # of no forget row
    assert len(words[7]) == 4
    assert words[7] != "1961"
    assert second.input == FORGET[1].input
    assert second.output != "yes"
    assert second.output in {row.output for row in OTHERS}
    assert not {"Ada", "Roe", "Torun"} & set(third.text.split())
    assert other_answers(FORGET, OTHERS, 0) == [first, second, third]
    assert other_answers(FORGET, OTHERS, 1) != [first, second, third]


def test_without_other_rows_the_forget_rows_lend_their_words() -> None:
    found = other_answers(FORGET, [], 0)
    assert all(a.text != b.text for a, b in zip(found, FORGET, strict=True))
