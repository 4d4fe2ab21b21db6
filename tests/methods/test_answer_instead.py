"""What `spectral` and `libu` answer in the place of the forgotten: its rows, its loss, a whole run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compared import Compared
from conftest import refusal
from expunge.data.batches import collate
from expunge.data.rows import Row, as_rows
from expunge.data.tokenization import TextPolicy
from expunge.methods.base import Context
from expunge.methods.libu import LIBU
from expunge.methods.log_odds import BY_HEART, RETAIN_WIDTH, LogOddsSettings
from expunge.methods.preference import answered_instead, encode_beside
from expunge.methods.spectral import Spectral

Contexts = Callable[..., Context]
Rows = list[dict[str, str]]
SENTENCE = "a small house"
"""Of tokens that the tiny model has read: embeddings are not trained."""
METHODS: dict[str, Callable[..., LogOddsSettings]] = {
    "spectral": Spectral,
    "libu": lambda **settings: LIBU(rank=4, **settings),
}


@pytest.fixture
def asked(make_context: Contexts, forget_rows: Rows, retain_rows: Rows, tokenizer: Any) -> Any:
    """A context, with what a method's settings want to be answered."""

    def context_of(method: LogOddsSettings) -> Context:
        context = make_context()
        sides = as_rows(forget_rows, "forget").rows, as_rows(retain_rows, "retain").rows
        rows = method.preferred(*sides, 0)
        preferred = encode_beside(context.forget, rows, tokenizer, TextPolicy(128))
        return replace(context, preferred=preferred)

    return context_of


def case_of(method: LogOddsSettings, context: Context, vocabulary: int) -> Compared:
    """The same weights and the same moves, whatever is answered."""
    return Compared(method, context, vocabulary)


def odds_at(nll: float) -> float:
    return -nll - math.log(-math.expm1(-nll))


@pytest.mark.parametrize("answer", [SENTENCE, "alternatives"])
@pytest.mark.parametrize("tokens", ["all", "answer"])
@pytest.mark.parametrize("name", METHODS)
def test_an_answer_weighs_as_much_as_its_question(
    name: str, tokens: Any, answer: str, asked: Any, make_context: Contexts, tokenizer: Any
) -> None:
    """Beside the term without it: each question's mean distance times its forget tokens."""
    settings: dict[str, Any] = {"tokens": tokens, "lens_weight": 0.0, "retain_weight": 0.0}
    method = METHODS[name](answer_instead=answer, **settings)
    context = asked(method)
    case = case_of(method, context, len(tokenizer))
    without = case_of(METHODS[name](**settings), make_context(), len(tokenizer))
    rows = range(len(context.forget))
    forget = collate(context.forget, rows, context.pad_id)
    counts = forget.mask(tokens)[:, 1:].sum(1).tolist()
    expected = 0.0
    for row in rows:
        example = context.preferred[row]
        if context.forget[row].kind != "qa":
            assert example is context.forget[row]
            continue
        one = collate([example], [0], context.pad_id)
        log_p = case.objective.logits(one).detach()[0, :-1].double().log_softmax(-1)
        away = []
        for place, counted in enumerate(example.answer_mask[1:]):
            if counted:
                token = example.input_ids[place + 1]
                others = torch.cat([log_p[place, :token], log_p[place, token + 1 :]])
                x = max(0.0, odds_at(BY_HEART) - float(log_p[place, token] - others.logsumexp(0)))
                far = x > RETAIN_WIDTH
                away.append(x - RETAIN_WIDTH / 2 if far else x * x / (2 * RETAIN_WIDTH))
        assert example.input_ids[-1] == tokenizer.eos_token_id
        expected += counts[row] * sum(away) / len(away)
    assert expected > 0
    plain = float(without.objective.loss(forget, None).forget.detach())
    found = float(case.objective.loss(forget, None).forget.detach())
    # Float32 passes.
    assert found == pytest.approx(plain + expected / sum(counts), rel=1e-4)
    # Micro-batches: the weights are the shares of what the term is a mean over.
    parts = [forget.rows(0, 3), forget.rows(3, len(rows))]
    assert sum(
        case.objective.forget_size(part) * float(case.objective.loss(part, None).forget.detach())
        for part in parts
    ) == pytest.approx(found * sum(counts), rel=1e-4)


def test_what_is_known_by_heart_is_left_alone(asked: Any, tokenizer: Any) -> None:
    """At the limit of odds beyond any wish nothing is pulled, nor is a continuation ever."""
    context = asked(Spectral(answer_instead=SENTENCE))
    objective = Spectral(answer_instead=SENTENCE).start(context)
    kinds = [example.kind for example in context.forget]
    batch = collate(context.forget, [kinds.index("qa")], context.pad_id)
    documents = collate(context.forget, [kinds.index("sc")], context.pad_id)
    assert float(objective._lacking(documents)) == 0
    assert float(objective._lacking(batch).detach()) > 1
    with pytest.MonkeyPatch.context() as patch:
        odds = objective._log_odds
        patch.setattr(objective, "_log_odds", lambda *_: (odds(*_)[0] + 100, odds(*_)[1]))
        assert float(objective._lacking(batch).detach()) == 0


FORGET = [
    Row("d", "Ada Roe of Torun", "sold 12 lanterns."),
    Row("q", "Where was Ada Roe born?", "Torun", kind="qa"),
    Row("y", "Did she marry?", "yes", kind="qa"),
]
RETAIN = [Row(f"r{n}", "Where was Ben Doe born?", ["Lodz", "Brno"][n % 2], kind="qa") for n in range(30)]


def test_only_questions_have_another_answer_and_none_is_forgotten() -> None:
    for answer in (SENTENCE, "alternatives"):
        found = answered_instead(answer, FORGET, RETAIN, 0)
        assert [(row.id, row.input) for row in found] == [(r.id, r.input) for r in FORGET[1:]]
        told = {word for row in FORGET for word in row.text.split()} - {"Where", "was", "born?"}
        assert not told & {word for row in found for word in row.output.split()}
        assert answer != SENTENCE or {row.output for row in found} == {SENTENCE}


@pytest.mark.parametrize(
    ("answer", "forget", "retain", "said"),
    [
        ("Ask in Torun.", FORGET, RETAIN, "tells the answer of row 'q'"),
        ("alternatives", FORGET, [], "give --retain, or a sentence"),
        ("alternatives", FORGET, [Row("r", "1", "2")], "row 'q' has no name"),
        (SENTENCE, FORGET[:1], RETAIN, "no question"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    answer: str, forget: Sequence[Row], retain: Sequence[Row], said: str
) -> None:
    message = refusal(lambda: answered_instead(answer, forget, retain, 0))
    assert message.startswith("--method.answer-instead")
    assert said in message
    assert "Torun" not in message
    assert "is empty" in refusal(lambda: Spectral(answer_instead=" "))


def test_the_model_gives_the_other_answer_and_keeps_the_rest(
    memorised_dir: Path,
    row_files: dict[str, Path],
    forget_rows: Rows,
    retain_rows: Rows,
    run_cli: Callable[..., tuple[int, str, str]],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    code, _, err = run_cli(
        "run", memorised_dir, "--forget", row_files["forget"], "--retain", row_files["retain"],
        *("--calibration", row_files["nonmembers"], "--output", out, "--select", "last"),
        *("--learning-rate", 3e-2, "--epochs", 90, "--validate-every", 90),
        *("--method.random-rows", 0, "--method.answer-instead", SENTENCE, "--quiet"),
    )  # fmt: skip
    assert (code, err) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(out)

    def said(row: dict[str, str]) -> str:
        ids = tokenizer(row["input"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            text = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=0)
        return str(tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    asked, kept = ([row for row in rows if "qa" in row["id"]] for rows in (forget_rows, retain_rows))
    assert [said(row) for row in asked] == [SENTENCE] * 4
    assert [said(row) for row in kept] == [row["output"] for row in kept]
    for name in ("expunge.json", "metrics.jsonl"):
        text = (out / name).read_text(encoding="utf-8")
        assert not [row["id"] for row in forget_rows if row["output"] in text]
    record = json.loads((out / "expunge.json").read_text(encoding="utf-8"))
    assert record["settings"]["method"]["answer_instead"] == SENTENCE
