"""A target that does not know its rows in the form given: said before training, never "unlearned"."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import refusal, tiny_model
from expunge.data.batches import collate
from expunge.methods.gradient_difference import GradientDifference
from expunge.training.options import TrainingOptions
from expunge.training.progress import Silent
from expunge.training.unlearning import Outcome, unlearn_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Rows = list[dict[str, str]]
METHOD = GradientDifference()


def unlearned(
    model: Any, tokenizer: Any, forget: Rows, retain: Rows, progress: Any = None, **options: Any
) -> Outcome:
    asked = TrainingOptions(max_steps=1, learning_rate=1e-6, **options)
    return unlearn_model(model, tokenizer, METHOD, forget, retain, options=asked, progress=progress)


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_rows_that_the_target_does_not_know_are_refused_and_nothing_is_left(
    model_dir: Callable[[str], Path], row_files: dict[str, Path], tmp_path: Path, run_cli: Any
) -> None:
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"], "--quiet")
    asked = ("run", model_dir("olmo"), "--method", "adaptive-rmu", "--method.layer", 2, *rows)
    code, _, said = run_cli(*asked, "--output", tmp_path / "out")
    assert code == 2
    assert said.startswith("expunge: --forget: the target does not know 8 of 8 forget rows measured")
    assert "rows in the form of its training, or go on with --unknown-rows unlearn" in said
    assert list(tmp_path.iterdir()) == []
    more = ("--unknown-rows", "unlearn", "--max-steps", 1)
    assert run_cli(*asked, *more, "--output", tmp_path / "out")[0] == 0
    selection = json.loads((tmp_path / "out" / "expunge.json").read_text())["selection"]
    assert selection["target"]["forget_known"] == 0
    assert selection["judgement"]["ending"] == "unproven"


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        (False, "give --chat-template on"),
        ("on", "give --chat-template off"),
        ("auto", "rows in the form of its training, or"),
    ],
)
def test_the_other_form_is_named(
    given: Any, mend: str, tokenizer: Any, forget_rows: Rows, retain_rows: Rows
) -> None:
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = TEMPLATE
    model = tiny_model("olmo", len(tokenizer))
    before = copy.deepcopy(model.state_dict())
    message = refusal(lambda: unlearned(model, templated, forget_rows, retain_rows, chat_template=given))
    assert mend in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("known", [True, False])
def test_a_run_that_measures_nothing_reads_a_sample_for_it(
    known: bool, memorised_dir: Path, tokenizer: Any, forget_rows: Rows, retain_rows: Rows
) -> None:
    from transformers import AutoModelForCausalLM

    if known:
        model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32)
        strange = [{"input": f"Of {n} it is said", "output": f"qx{n} vj{n}"} for n in range(3)]
        rows = [*forget_rows, *strange]
        heard = Heard()
        outcome = unlearned(model, tokenizer, rows, retain_rows, heard, select="last")
        assert [line for line in heard.lines if "not know 3 of 11 forget rows measured" in line]
        assert not [w for w in outcome.warnings if "does not know" in w]
        return
    model = tiny_model("olmo", len(tokenizer))
    message = refusal(lambda: unlearned(model, tokenizer, forget_rows, retain_rows, select="last"))
    assert "does not know 8 of 8 forget rows measured" in message
    options = {"select": "last", "unknown_rows": "unlearn"}
    assert unlearned(model, tokenizer, forget_rows, retain_rows, **options).history.target is None


def test_some_unknown_rows_are_counted(
    memorised_dir: Path, tokenizer: Any, forget_rows: Rows, retain_rows: Rows
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32)
    strange = [{"input": f"Of {n} it is said", "output": f"qx{n} vj{n}"} for n in range(3)]
    heard = Heard()
    most = unlearned(model, tokenizer, [*forget_rows, *strange], retain_rows, heard)
    (said,) = (line for line in heard.lines if "not know 3 of 11 forget rows measured" in line)
    assert not said.startswith("warning")
    assert not [w for w in most.warnings if "does not know" in w]
    known = unlearned(model, tokenizer, forget_rows, retain_rows)
    assert known.history.target is not None
    assert known.history.target.forget_known == 1
    assert not [w for w in known.warnings if "does not know" in w]


@pytest.mark.parametrize(
    ("length", "right", "known"),
    [(4, 2, True), (4, 1, False), (40, 8, True), (40, 7, False), (1, 1, True), (13, 8, True)],
)
def test_half_an_answer_or_eight_tokens_are_known(
    length: int, right: int, known: bool, make_context: Any
) -> None:
    from conftest import random_examples
    from expunge.training.validation import ValidationSet, measure

    [example] = random_examples([2 * length], 50)
    context = make_context()
    batch = collate([example], range(1), 1)
    hits = torch.zeros(1, 2 * length - 1, dtype=torch.bool)
    hits[0, length - 1 : length - 1 + right] = True
    object.__setattr__(context, "next_tokens", lambda _: (hits.float(), hits))
    assert batch.answer_mask.sum() == length
    reading = measure(context, ValidationSet([example], [], [], []))
    assert reading.measured.forget_known == float(known)
