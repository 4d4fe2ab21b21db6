"""The pass that chooses a layer: its numbers are those of separate, plain runs of the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, random_examples, shaken, tiny_model
from expunge.analysis import layer_rows
from expunge.analysis.layer_rows import ANSWER_TOKENS
from expunge.analysis.layers import LayerChoice, LayerPass, choose_layer
from expunge.data.rows import as_rows
from expunge.data.tokenization import Example, TextPolicy, encode_rows
from expunge.models.decoder import DecoderLayout, find_layout
from expunge.models.loading import check_model, load_model
from expunge.models.parts import StreamedModel, WholeModel

VOCABULARY = 300
Plain = Callable[[], AbstractContextManager[Any]]


def silent(_name: str, _done: int, _total: int) -> None:
    pass


def passed(model: Any, forget: list[Example], retain: list[Example], **options: Any) -> LayerPass:
    done = LayerPass(
        WholeModel(model),
        find_layout(model),
        forget,
        retain,
        3,
        seed=0,
        autocast=nullcontext,
        **options,
    )
    done.run(silent)
    return done


def choose(model: Any, forget: list[Example], retain: list[Example], seed: int = 0) -> LayerChoice:
    return choose_layer(
        *(WholeModel(model), find_layout(model), forget, retain, 3, 2),
        seed=seed, autocast=nullcontext, progress=silent,
    )  # fmt: skip


class Slow:
    """The same by one run a variant, one row at a time, with hooks that do one thing each."""

    def __init__(self, model: Any, layout: DecoderLayout) -> None:
        self.model, self.layout = model, layout

    def run(
        self,
        ids: tuple[int, ...],
        at: int | None = None,
        put: dict[int, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Log-probabilities (tokens, vocabulary), states by layer from the embeddings on, MLP inputs."""
        states: list[torch.Tensor] = []
        inputs: list[torch.Tensor] = []
        handles = []
        for index in range(self.layout.count):
            layer = self.layout.layer(self.model, index)

            def before(_m: Any, args: Any, kwargs: Any, index: int = index) -> None:
                if index == 0:
                    states.append((args[0] if args else kwargs["hidden_states"])[0].clone())

            def after(_m: Any, _a: Any, output: Any, index: int = index) -> Any:
                given = output[0] if isinstance(output, tuple) else output
                if index == at:
                    for place, state in (put or {}).items():
                        given[0, place] = state
                states.append(given[0].clone())

            def taken(_m: Any, args: Any) -> None:
                inputs.append(args[0][0].clone())

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
            projection = layer.get_submodule(self.layout.mlp_output)
            handles.append(projection.register_forward_pre_hook(taken))
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        for handle in handles:
            handle.remove()
        return logits.log_softmax(-1), states, inputs

    def lens(self, states: torch.Tensor) -> torch.Tensor:
        """The model's head on states in the place of the last layer's."""

        def instead(_m: Any, _a: Any, output: Any) -> Any:
            return (states[None], *output[1:]) if isinstance(output, tuple) else states[None]

        last = self.layout.layer(self.model, self.layout.count - 1)
        handle = last.register_forward_hook(instead)
        with torch.no_grad():
            logits = self.model(input_ids=torch.zeros((1, len(states)), dtype=torch.long)).logits
        handle.remove()
        return logits[0].log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_that_of_plain_runs(family: str) -> None:
    model = shaken(tiny_model(family, VOCABULARY, layers=4))
    layout = find_layout(model)
    forget = random_examples((9, 14, 12), VOCABULARY)
    retain = random_examples((11, 8), VOCABULARY, seed=5)
    done = passed(
        model, forget, retain, pass_tokens=600
    )  # two forget rows in the first pass, and one left
    slow = Slow(model, layout)
    rows = done._sides["forget"]
    assert list(map(len, done._chunks(rows, 3))) == [2, 1]
    for number, index in enumerate(i for chunk in done._chunks(rows, 3) for i in chunk):
        row, spoilt = rows[index], done._spoilt[index]
        places, targets = list(row.places), torch.tensor(row.targets)

        def mean(log_probs: torch.Tensor, targets: torch.Tensor = targets) -> float:
            return float(log_probs[range(len(targets)), targets].mean())

        clean, states, _ = slow.run(row.ids)
        corrupted, _, _ = slow.run(spoilt)
        assert float(done._clean[number]) == pytest.approx(mean(clean[places]), abs=1e-4)
        assert float(done._corrupted[number]) == pytest.approx(mean(corrupted[places]), abs=1e-4)
        for candidate, layer in enumerate((2, 3)):
            put = {place: states[layer + 1][place] for place in places}
            patched, _, _ = slow.run(spoilt, layer, put)
            found = float(done._patches[number][candidate])
            assert found == pytest.approx(mean(patched[places]), abs=1e-4)
            lens = slow.lens(states[layer + 1][places])
            assert float(done._lens[number][candidate]) == pytest.approx(mean(lens), abs=1e-4)
    for side, examples in (("forget", rows), ("retain", done._sides["retain"])):
        order = [i for chunk in done._chunks(examples, 3 if side == "forget" else 1) for i in chunk]
        plain = [slow.run(examples[i].ids)[2] for i in order]
        for layer in range(4):
            expected = torch.cat(
                [inputs[layer][list(examples[i].places)] for inputs, i in zip(plain, order, strict=True)]
            )
            torch.testing.assert_close(
                torch.cat(done._inputs[side][layer]), expected, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_decodes_and_restores_everything(family: str) -> None:
    model = shaken(tiny_model(family, VOCABULARY))
    last = passed(model, random_examples((9, 14), VOCABULARY), []).readings()[-1]
    assert last.layer == 3
    # Random weights know nothing of random rows, or by chance a little; what they know is all there.
    assert last.decodable in (None, pytest.approx(1))
    assert last.restored in (None, pytest.approx(1))
    assert last.separate is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_a_pass_changes_no_number(family: str) -> None:
    model = shaken(tiny_model(family, VOCABULARY))
    forget, retain = (random_examples((9, 14, 12), VOCABULARY, seed=s) for s in (0, 5))
    one, many = (passed(model, forget, retain, pass_tokens=tokens).readings() for tokens in (1, 10**6))
    for mine, other in zip(one, many, strict=True):
        for name, value in vars(mine).items():
            # Sums of another order; losses of random weights leave few digits after it.
            assert vars(other)[name] == (value if value is None else pytest.approx(value, rel=1e-3))


@pytest.fixture(scope="module")
def memorised(
    memorised_dir: Path,
    tokenizer: Any,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
) -> tuple[Any, list[Example], list[Example]]:
    model = load_model(check_model(str(memorised_dir)), "float32", "cpu")
    sides = (("forget", forget_rows), ("retain", retain_rows))
    forget, retain = (
        encode_rows(as_rows(rows, name), tokenizer, TextPolicy(128), eos=name == "retain")  # type: ignore[arg-type]
        for name, rows in sides
    )
    return model, forget, retain


def test_what_was_learned_by_heart_is_found(memorised: Any) -> None:
    choice = choose(*memorised)
    assert choice.warning is None
    assert choice.rows == {"forget": 8, "retain": 8}
    assert choice.clean is not None
    assert choice.corrupted is not None
    assert choice.clean > -0.2 > -1 > choice.corrupted
    scores = {reading.layer: reading.score for reading in choice.readings}
    assert set(scores) == {2, 3}
    assert choice.layer == max(scores, key=lambda layer: scores[layer] or 0)
    for reading in choice.readings:
        values = (reading.score, reading.decodable, reading.restored, reading.separate)
        for value in values:
            assert value is not None
            assert 0 <= value <= 1


def test_the_same_rows_give_the_same_choice_and_it_survives_json(memorised: Any) -> None:
    import json

    first, again = choose(*memorised), choose(*memorised)
    assert first == again
    assert LayerChoice.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_the_model_is_left_as_it_was(memorised: Any) -> None:
    model, forget, retain = memorised
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([forget[0].input_ids])
    plain = model(input_ids=ids).logits
    choose(model, forget, retain)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_model_in_parts_gives_what_the_whole_one_gives(memorised: Any, memorised_dir: Path) -> None:
    model, forget, retain = memorised
    parts = StreamedModel(check_model(str(memorised_dir)), torch.float32, "cpu")
    found = choose_layer(
        *(parts, find_layout(model), forget, retain, 3, 2),
        seed=0, autocast=nullcontext, progress=silent,
    )  # fmt: skip
    assert found == choose(model, forget, retain)
    assert all(parameter.is_meta for parameter in parts.model.parameters())


def test_a_target_that_knows_nothing_gets_the_usual_layer_and_a_warning(
    memorised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forget, retain = memorised
    model = tiny_model("olmo", 400)
    for parameter in model.parameters():
        parameter.data.zero_()  # every token is as likely as any other
    choice = choose(model, forget, retain)
    assert choice.layer == 2
    assert choice.warning is not None
    assert "prompts do not help the target" in choice.warning
    assert all(reading.score is None for reading in choice.readings)


def test_with_one_candidate_there_is_nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerPass, "run", lambda *_: pytest.fail("read"))
    model = tiny_model("olmo", VOCABULARY, layers=3)
    choice = choose(model, random_examples((9,), VOCABULARY), [])
    assert (choice.layer, choice.readings) == (2, ())


def example(row_id: str, answer: str, **more: Any) -> Example:
    """`answer` holds a letter a token: b BOS, p prompt, a answer."""
    first = more.pop("first", 2)
    return Example(
        row_id,
        more.pop("task", "default"),
        tuple(range(first, first + len(answer))),
        tuple(letter != "b" for letter in answer),
        tuple(letter == "a" for letter in answer),
        **more,
    )


def test_a_row_is_cut_behind_the_tokens_that_are_read() -> None:
    row = layer_rows._row(example("x", "bppp" + "a" * 20))
    assert row is not None
    assert row.places == tuple(range(3, 3 + ANSWER_TOKENS))
    assert row.prompt == (1, 2, 3)  # never BOS
    assert len(row.ids) == 4 + ANSWER_TOKENS
    assert row.targets == list(row.ids[4:])


def test_text_without_a_prompt_is_split_in_its_middle() -> None:
    row = layer_rows._row(example("x", "b" + "a" * 9))
    assert row is not None
    assert row.prompt == (1, 2, 3, 4)
    assert row.places == (4, 5, 6, 7, 8)
    assert layer_rows._row(example("x", "a")) is None
    assert layer_rows._row(example("x", "ba")) is None


def test_the_sample_holds_as_many_of_every_kind_and_each_row_once() -> None:
    rows = [example(f"q{i}", "ppaa", kind="qa", first=i) for i in range(40)]
    rows += [example(f"s{i}", "pppaa", task="Task2") for i in range(3)]
    rows += [example("q0", "ppaaa", kind="qa"), example("r", "ppaa", listed=False)]
    sample = layer_rows.sampled(rows, torch.Generator().manual_seed(0))
    assert len(sample) == layer_rows.ROWS
    assert sum(len(row.ids) == 5 for row in sample) == 3
    again = layer_rows.sampled(rows, torch.Generator().manual_seed(0))
    other = layer_rows.sampled(rows, torch.Generator().manual_seed(1))
    assert sample == again != other


def test_only_the_prompt_is_exchanged() -> None:
    rows = [row for row in map(layer_rows._row, random_examples((12, 9), VOCABULARY)) if row]
    for row, ids in zip(
        rows, layer_rows.corrupted_ids(rows, torch.Generator().manual_seed(0)), strict=True
    ):
        kept = [place for place in range(len(row.ids)) if place not in row.prompt]
        assert [ids[place] for place in kept] == [row.ids[place] for place in kept]
        assert ids != row.ids
        pool = {other.ids[place] for other in rows for place in other.prompt}
        assert set(ids) <= pool | {row.ids[place] for place in kept}
