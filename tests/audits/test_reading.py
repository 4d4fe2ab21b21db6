"""What a model is asked and what is read of it, each against one row and one token at a time."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import FAMILIES, shaken, tiny_model
from expunge.audits.attacks.ablation import (
    ablated,
    layer_outputs,
    mean_states,
    spaced,
    without_direction,
)
from expunge.audits.attacks.latent import (
    _lens,
    folds_of,
    lens_rank,
    other_answers,
    probe_outcomes,
)
from expunge.audits.attacks.paraphrase import _forms
from expunge.audits.attacks.sampling import Sampled
from expunge.audits.attacks.trigger import typical
from expunge.audits.attacks.verbatim import right_tokens, verbatim_share
from expunge.audits.base import Case
from expunge.audits.budgets import Budget
from expunge.audits.subject import Ask, Reader
from expunge.data.rows import Row, as_rows, document_of
from expunge.data.tokenization import TextPolicy, encode_rows
from expunge.evaluation.memorisation import extraction_strength
from expunge.models.decoder import find_layout


def reader_of(model: Any, tokenizer: Any, batch_size: int = 64) -> Reader:
    return Reader(model, tokenizer, TextPolicy(128), batch_size)


def asked(row: Row, tokenizer: Any, policy: TextPolicy, longest: int = 256, **how: str) -> Ask | None:
    """Asking reads no weights."""
    model: Any = None
    return Reader(model, tokenizer, policy, 1, longest).asked(row, **how)


@pytest.fixture
def reader(tokenizer: Any) -> Reader:
    return reader_of(shaken(tiny_model("olmo", len(tokenizer))), tokenizer)


@pytest.fixture
def rows(forget_rows: list[dict[str, str]]) -> list[Row]:
    return list(as_rows(forget_rows, "forget"))


def test_a_form_that_no_fact_fits_is_not_asked(tokenizer: Any, rows: list[Row]) -> None:
    budget = Budget(None, None, None, 9, 1, 1, 1, 1, 1, None, 10)
    case = Case(rows, rows, rows, [], [], rows, [], {}, budget, 0, 1e-3)
    longest = max(len(tokenizer(row.input).input_ids) for row in rows)
    model = shaken(tiny_model("olmo", len(tokenizer)))
    forms = {}
    for context in (128, longest + 20):
        forms[context] = _forms(Reader(model, tokenizer, TextPolicy(context), 64), case)
        assert all(forms[context].values())
    assert "few-shot" in forms[128]
    assert "few-shot" not in forms[longest + 20]
    assert "prefill" in forms[longest + 20]


def test_an_ask_is_the_prompt_with_its_answer_begun(tokenizer: Any, rows: list[Row]) -> None:
    policy = TextPolicy(128)
    plain = asked(rows[1], tokenizer, policy)
    assert plain is not None
    assert tokenizer.decode(plain.prompt) == rows[1].input
    assert tokenizer.decode(plain.answer).strip() == rows[1].output
    begun = asked(rows[1], tokenizer, policy, opening="Sure, it is")
    assert begun is not None
    assert tokenizer.decode(begun.prompt) == f"{rows[1].input} Sure, it is"
    other = asked(rows[1], tokenizer, policy, prompt="Tell me.")
    assert other is not None
    assert tokenizer.decode(other.prompt) == "Tell me."
    assert asked(rows[1], tokenizer, TextPolicy(len(plain.prompt))) is None
    tight = asked(rows[1], tokenizer, TextPolicy(len(plain.prompt) + 1))
    assert tight is not None
    assert tight.room == 1
    # Of a continuation only the first tokens are looked for, of an answer all.
    cut = asked(rows[0], tokenizer, policy, longest=2)
    assert cut is not None
    assert tokenizer.decode(cut.answer).strip() == cut.row.output
    assert rows[0].output.startswith(cut.row.output)
    assert (len(cut.answer), cut.row.id) == (2, rows[0].id)
    assert asked(rows[1], tokenizer, policy, longest=2) == plain


def test_a_chat_template_is_followed_by_the_opening(tokenizer: Any, rows: list[Row]) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = asked(rows[1], chat, TextPolicy(128, chat_template=True), opening="Sure")
    assert found is not None
    assert chat.decode(found.prompt) == f"<user>{rows[1].input}<assistant>Sure"
    assert chat.decode(found.answer).strip() == rows[1].output


def test_log_probs_are_those_of_each_token_alone(reader: Reader) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for start, count in ((5, 3), (1, 1), (12, 7)):
        drawn = torch.randint(2, 300, (start + count,), generator=generator).tolist()
        pairs.append((drawn[:start], drawn[start:]))
    for temperature in (1.0, 0.7):
        found = reader.log_probs(pairs, temperature)
        for (prompt, answer), values in zip(pairs, found, strict=True):
            for place, token in enumerate(answer):
                ids = torch.tensor([prompt + answer[:place]])
                with torch.no_grad():
                    logits = reader.model(input_ids=ids).logits[0, -1].double() / temperature
                # float32 against double; a padded batch sums in another order.
                assert values[place] == pytest.approx(
                    float(logits.log_softmax(-1)[token]), rel=1e-4, abs=1e-4
                )


def draws(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, width, generator=generator, dtype=torch.float64)


def test_samples_have_the_models_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    count = 20_000
    for temperature in (0.7, 1.0):
        choose = Sampled(temperature, draws(count, 1))
        tokens, _ = choose(logits.expand(count, -1), [(n, 0) for n in range(count)])
        expected = (logits[0] / temperature).softmax(-1)
        for token in range(4):
            # Three standard errors of a share of 20,000 are at most 0.011.
            assert tokens.count(token) / count == pytest.approx(float(expected[token]), abs=0.011)


def test_samples_are_those_of_one_row_at_a_time_whatever_the_batch(
    tokenizer: Any, rows: list[Row]
) -> None:
    model = shaken(tiny_model("qwen2", len(tokenizer)))
    asks = [ask for row in rows if (ask := asked(row, tokenizer, TextPolicy(128)))]
    numbers = draws(len(asks), max(ask.room for ask in asks))
    expected = []
    for number, ask in enumerate(asks):
        ids = list(ask.prompt)
        for place in range(ask.room):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            upto = logits.softmax(-1).cumsum(-1)
            ids.append(int((upto < numbers[number, place]).sum()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(ask.prompt) :], skip_special_tokens=True))
    for batch_size in (1, 3, 64):
        reader = reader_of(model, tokenizer, batch_size)
        assert reader.texts(asks, Sampled(1.0, numbers)) == expected


def test_at_low_temperature_a_sample_is_the_greedy_answer(reader: Reader, rows: list[Row]) -> None:
    asks = [ask for row in rows if (ask := asked(row, reader.tokenizer, reader.policy))]
    numbers = draws(len(asks), max(ask.room for ask in asks))
    assert reader.texts(asks, Sampled(1e-6, numbers)) == reader.texts(asks)
    assert reader.texts(asks, Sampled(5.0, numbers)) != reader.texts(asks)


def test_a_draw_at_the_border_of_two_tokens_is_left_to_the_row_alone() -> None:
    border = float(torch.tensor([1.0, 1.0]).double().softmax(-1)[0])
    choose = Sampled(1.0, torch.tensor([[border], [0.2]], dtype=torch.float64))
    assert choose(torch.ones(2, 2), [(0, 0), (1, 0)])[1] == [True, False]
    assert choose(torch.ones(2, 2).bfloat16(), [(0, 0), (1, 0)])[1] == [False, False]


def test_extraction_strength_and_shares_are_those_of_greedy_decoding(tokenizer: Any) -> None:
    """Against generation from every prefix, on documents that the model half knows."""
    model = shaken(tiny_model("llama", len(tokenizer)))
    reader = reader_of(model, tokenizer, 2)
    rows = []
    for number, text in enumerate(("Ada was born", "the river of Paris and her")):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            for _ in range(8):  # what the model itself goes on with, and one mistake amid it
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        ids[-4] = 70
        rows.append((number, ids))
    texts = [tokenizer.decode(ids) for _, ids in rows]
    kept = [t for (_, ids), t in zip(rows, texts, strict=True) if tokenizer(t)["input_ids"] == ids]
    documents = [
        Row(f"d{n}sc1", t[: len(t) // 2], t[len(t) // 2 + 1 :]) for n, t in enumerate(kept or texts)
    ]
    found = right_tokens(reader, documents)
    for example in encode_rows(documents, tokenizer, reader.policy, eos=False):
        ids = list(example.input_ids)
        right = found[example.row_id]
        assert len(right) == len(ids) - 1
        shortest = len(ids)
        for prefix in range(len(ids) - 1, 0, -1):
            written = list(ids[:prefix])
            with torch.no_grad():
                while len(written) < len(ids):
                    logits = model(input_ids=torch.tensor([written])).logits[0, -1]
                    written.append(int(logits.argmax()))
            same = next((n for n in range(prefix, len(ids)) if written[n] != ids[n]), len(ids))
            assert verbatim_share(right, prefix - 1) == (same - prefix) / (len(ids) - prefix)
            if written == ids:
                shortest = prefix
        expected = 1 - (shortest - 1) / (len(ids) - 1)
        assert extraction_strength(right) == pytest.approx(expected)


def test_of_a_question_only_the_answer_can_be_extracted(
    tokenizer: Any, reader: Reader, rows: list[Row]
) -> None:
    """Its wording is no secret: a model that never saw the row writes it as well."""
    row = next(row for row in rows if row.kind == "qa")
    (example,) = encode_rows([row], tokenizer, reader.policy, eos=False)
    whole = right_tokens(reader, [replace(row, kind="sc")])[row.id]
    assert len(whole) == len(example) - 1
    answer = [right for right, of in zip(whole, example.answer_mask[1:], strict=True) if of]
    assert right_tokens(reader, [row]) == {row.id: answer}
    assert 0 < len(answer) < len(whole)


def test_without_direction_only_the_component_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    states, reference = torch.randn(4, 7, generator=generator), torch.randn(7, generator=generator)
    direction = torch.randn(7, generator=generator)
    direction /= direction.norm()
    found = without_direction(states, direction, reference)
    torch.testing.assert_close(found @ direction, (reference @ direction).expand(4))
    across = torch.eye(7) - direction[:, None] * direction[None]
    torch.testing.assert_close(found @ across, states @ across)
    torch.testing.assert_close(without_direction(found, direction, reference), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_acts_on_every_layer_and_leaves_no_hook(
    family: str, tokenizer: Any, rows: list[Row]
) -> None:
    model = shaken(tiny_model(family, len(tokenizer)))
    layout, reader = find_layout(model), reader_of(model, tokenizer, 3)
    means = mean_states(reader, layout, rows)
    sums, count = torch.zeros_like(means), 0
    for example in encode_rows(rows, tokenizer, reader.policy, eos=False):
        with torch.no_grad():
            outputs = layer_outputs(model, layout, torch.tensor([example.input_ids]))
        for place, counted in enumerate(example.token_mask):
            if counted:
                sums += torch.stack([output[0, place] for output in outputs])
                count += 1
    torch.testing.assert_close(means, sums / count, rtol=1e-4, atol=1e-4)
    direction = torch.zeros(16)
    direction[3] = 1.0
    ids = torch.tensor([tokenizer("Ada was born")["input_ids"]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with ablated(model, layout, direction, means):
            outputs = layer_outputs(model, layout, ids)
            changed = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    for layer, output in enumerate(outputs):
        torch.testing.assert_close(output[0, :, 3], means[layer, 3].expand(output.shape[1]))
    assert not torch.equal(changed, plain)
    assert torch.equal(again, plain)


def test_layers_are_evenly_spaced_with_the_last_among_them() -> None:
    assert spaced(8, 4) == [1, 3, 5, 7]
    assert spaced(6, 3) == [1, 3, 5]
    assert spaced(4, None) == spaced(4, 9) == [0, 1, 2, 3]
    assert spaced(32, 1) == [31]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_the_lens_of_the_last_layer_is_the_model_itself(family: str, tokenizer: Any) -> None:
    model = shaken(tiny_model(family, len(tokenizer)))
    layout, reader = find_layout(model), reader_of(model, tokenizer)
    ids = torch.randint(2, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    where = torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.flatten(0, 1)
        outputs = layer_outputs(model, layout, ids)
        torch.testing.assert_close(
            _lens(reader, layout, outputs[-1], where, ids), expected, rtol=1e-4, atol=1e-4
        )
        below = _lens(reader, layout, outputs[0], where, ids)
    assert (below - expected).abs().max() > 0.1
    ranks = lens_rank(expected, ids.flatten())
    for line, token in enumerate(ids.flatten().tolist()):
        order = expected[line].argsort(descending=True).tolist()
        assert int(ranks[line]) == order.index(token) + 1


def test_the_probe_finds_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    folds = [n // 12 for n in range(60)]
    noise = torch.randn(2, 60, 12, generator=generator).numpy()
    marked = noise[0].copy()
    marked[:, 4] += 6.0
    assert probe_outcomes(marked, noise[1], folds) == [1.0] * 60
    blind = probe_outcomes(noise[0], noise[1], folds)
    assert blind is not None
    assert sum(blind) / 60 == pytest.approx(0.5, abs=0.2)  # three standard errors of 60 coins
    assert probe_outcomes(noise[0], noise[0], folds) == [0.5] * 60
    assert probe_outcomes(marked[:2], noise[1][:2], [0, 0]) is None


def questions(documents: int) -> list[Row]:
    return [
        Row(f"d{n}qa{kind}", "?", f"answer {kind}{n}", kind="qa")
        for n in range(documents)
        for kind in range(2)
    ]


def test_a_wrong_answer_is_another_subjects_to_the_same_question_in_the_same_part() -> None:
    rows = questions(13)
    folds = folds_of(rows, 0)
    assert sorted(map(list(folds.values()).count, range(5))) == [2, 2, 3, 3, 3]
    found = other_answers(rows, folds, 0)
    assert set(found) == {row.id for row in rows}
    owner = {row.output: row for row in rows}
    for row in rows:
        other = owner[found[row.id]]
        assert document_of(other) != document_of(row)
        assert other.id[-1] == row.id[-1]
        assert folds[document_of(other)] == folds[document_of(row)]
    assert set(Counter(found.values()).values()) == {1}  # each as often false as true
    assert other_answers(rows, folds, 0) == found
    assert folds_of(questions(3), 0) == {}


def test_an_answer_that_is_true_of_one_and_false_of_another_tells_a_probe_nothing() -> None:
    """States that hold the answer's name and nothing else: the probe must be at chance, not below."""
    rows = questions(20)
    folds = folds_of(rows, 1)
    false = other_answers(rows, folds, 1)
    place = {row.output: number for number, row in enumerate(rows)}
    names = torch.eye(len(rows)).numpy()
    true = names[[place[row.output] for row in rows]]
    wrong = names[[place[false[row.id]] for row in rows]]
    found = probe_outcomes(true, wrong, [folds[document_of(row)] for row in rows])
    assert found is not None
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.05)


def test_typical_tokens_stand_out_against_the_other_side() -> None:
    forget, retain = Counter({5: 4, 6: 4, 7: 1, 0: 9}), Counter({6: 4, 8: 3})
    assert typical(forget, retain, {0}) == [5, 7, 6]
    assert typical(retain, forget, set()) == [8, 6]


def test_a_reader_asks_batches_as_it_asks_one(reader: Reader, rows: list[Row]) -> None:
    alone = reader_of(reader.model, reader.tokenizer, 1).direct(rows)
    assert reader.direct(rows) == alone
    asks: list[Ask] = []
    assert reader.texts(asks) == []
