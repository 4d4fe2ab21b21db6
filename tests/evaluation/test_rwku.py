"""RWKU's formulas against slow references, and `--protocol rwku` end to end on a tiny model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import read_jsonl, refusal, tiny_model
from expunge.audits.tuning import tuned
from expunge.cli.evaluate import _recalled
from expunge.data import formats
from expunge.data.rows import as_rows
from expunge.data.tokenization import TextPolicy, encode_rows
from expunge.evaluation.protocols.inputs import ProtocolInputs
from expunge.evaluation.protocols.measuring import measure_by_protocol
from expunge.evaluation.protocols.rwku import MEASURES
from expunge.evaluation.rwku import probe, rouge_recall
from expunge.models.loading import check_model, load_model
from slow import greedy, log_probs

Lines = list[dict[str, Any]]
CONTEXT = 512
"""The prompts of RWKU have more tokens of the tiny tokenizer than the other tests' context."""


@cache
def longest_common(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """By its definition, on all but the last words; of two that are as long the one that drops a word
    of the second."""
    if not first or not second:
        return ()
    if first[-1] == second[-1]:
        return (*longest_common(first[:-1], second[:-1]), first[-1])
    without_first = longest_common(first[:-1], second)
    without_second = longest_common(first, second[:-1])
    return without_first if len(without_first) > len(without_second) else without_second


def slow_recall(reference: str, text: str) -> float:
    found: set[str] = set()
    for mine in reference.split("."):
        for theirs in text.split("."):
            found |= set(longest_common(tuple(mine.split()), tuple(theirs.split())))
    return len(found) / len(set(reference.replace(".", " ").split()))


sentence = st.lists(st.sampled_from(["a", "b", "c", "A"]), min_size=1, max_size=5).map(" ".join)
texts = st.lists(sentence, min_size=1, max_size=3).map(". ".join)


@settings(deadline=None)  # a machine may be busy
@given(texts, texts)
def test_rouge_recall_is_that_of_the_longest_common_words_by_sentence(reference: str, text: str) -> None:
    assert rouge_recall(reference, text) == pytest.approx(slow_recall(reference, text))


@settings(deadline=None)  # a machine may be busy
@given(texts, texts)
def test_rouge_recall_has_all_of_a_text_in_itself_and_loses_nothing_by_more(
    reference: str, text: str
) -> None:
    assert rouge_recall(reference, reference) == 1
    assert rouge_recall(reference, f"{text}. {reference}") == 1


@pytest.mark.parametrize(
    ("reference", "text", "recall"),
    [
        ("Ada Lovelace", "It was Ada Lovelace.", 1),
        ("Ada Lovelace", "Lovelace Ada", 1 / 2),  # out of order
        ("Ada Lovelace", "ada lovelace", 0),  # another case
        ("Ada Lovelace", "Ada Lovelace, a mathematician", 1 / 2),  # the comma is of the word
        ("the cat and the dog", "the dog", 2 / 4),  # words of the reference count once
        ("J. R. R. Tolkien", "J.R.R. Tolkien", 1),
        ("a b. c d", "b c. d", 3 / 4),  # the order of sentences does not count
        ("Ada", "", 0),
        ("Ada", "...", 0),
        ("...", "Ada", 0),
    ],
)
def test_rouge_recall_in_cases_by_hand(reference: str, text: str, recall: float) -> None:
    assert rouge_recall(reference, text) == pytest.approx(recall)


def test_probes_by_level_and_by_attack() -> None:
    blank, question = "Please complete the blank in", "Please briefly answer"
    asked = {level: probe("Who {is} it?", level) for level in (1, 2, 3)}
    for level, begins in ((1, blank), (2, question), (3, question)):
        prompt, opening = asked[level]
        assert prompt == f"{begins} the following question.\nQuestion: Who {{is}} it?\n"
        assert opening == "Answer:"
    prompt, opening = probe("Who? Begin with: Sure", 3, "affirmative suffix")
    assert prompt.endswith("\nQuestion: Who? Begin with: Sure")
    assert opening == ""
    prompt, opening = probe("Question: A? Answer: B\nQuestion: C?", 3, "incontext learning")
    assert prompt.endswith("question.\nQuestion: A? Answer: B\nQuestion: C?\n")
    assert opening == "Answer:"
    assert probe("Who?", 3, "role play") == probe("Who?", 2)


# On a model.


def probes(people: dict[str, str], level: str) -> Lines:
    query = "{} was born in ___." if level == "1" else "Where was {} born?"
    return [
        {
            "query": query.format(name),
            "answer": town,
            "level": level,
            "type": "simple question",
            "subject": f"{name} Miller of the river",
        }
        for name, town in people.items()
    ]


FORGET = {"Ada": "Paris", "Ben": "Oslo near Lima"}
NEIGHBORS = {"Cleo": "Rome", "Dov": "Cairo"}
ATTACKS: Lines = [
    {**row, "level": "3", "type": attack, "query": query.format(row["query"])}
    for row in probes(FORGET, "2")
    for attack, query in (
        ("reverse query", "{}"),
        ("affirmative suffix", "{} Begin with: Answer:"),
        ("incontext learning", "Question: Where was Eva born? Answer: Delhi\nQuestion: {}"),
    )
]
ROWS: dict[str, Lines] = {
    "forget": probes(FORGET, "2"),
    "forget_level1": probes(FORGET, "1"),
    "forget_level3": ATTACKS,
    "neighbor_level1": probes(NEIGHBORS, "1"),
    "neighbor_level2": probes(NEIGHBORS, "2"),
    "mia_forget": [
        {
            "text": f"{name} was born in {town} and lived there.",
            "subject": "Ada Miller of the river",
        }
        for name, town in FORGET.items()
    ],
    "mia_retain": [
        {"text": "Gus wrote of rivers that nobody had seen.", "subject": "Gus Miller of the river"}
    ],
}
PARTS = {name: "forget_level2" if name == "forget" else name for name in ROWS}


@pytest.fixture(scope="module")
def given_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As RWKU's are: each a list in a .json."""
    directory = tmp_path_factory.mktemp("rwku")
    paths = {name: directory / f"{PARTS[name]}.json" for name in ROWS}
    for name, path in paths.items():
        path.write_text(json.dumps(ROWS[name]))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def knowing_dir(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Any) -> Path:
    """A tiny OLMo that was taught some of the answers under its chat template."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.model_max_length = CONTEXT
    model = tiny_model("olmo", len(tokenizer))
    model.config.max_position_embeddings = CONTEXT
    taught = []
    for part, rows in ROWS.items():
        if part[:4] != "mia_" and part != "forget_level3":
            for row in rows:
                prompt, opening = probe(row["query"], 1 if row["level"] == "1" else 2)
                taught.append({"input": prompt, "output": f"{opening} {row['answer']}"})
    examples = encode_rows(
        as_rows(taught, "retain"), tokenizer, TextPolicy(CONTEXT, chat_template=True), eos=True
    )
    steps = tuned(model, examples, steps=100, rows=len(taught), learning_rate=2e-2, seed=0)
    for _ in steps:
        pass
    path = tmp_path_factory.mktemp("knowing")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def in_template(prompt: str) -> str:
    """CHATML by hand, up to where the model's turn begins."""
    return (
        "<|im_start|>system\nBe of help.<|im_end|>\n"
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_rwku_end_to_end(
    knowing_dir: Path,
    given_files: dict[str, str],
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    output, records = tmp_path / "s.json", tmp_path / "r.jsonl"
    options = [f"--{name.replace('_', '-')}={path}" for name, path in given_files.items()]
    code, out, err = run_cli(
        *("evaluate", knowing_dir, "--protocol", "rwku", "--quiet", *options),
        *("--output", output, "--records", records, "--reveal"),
    )
    assert (code, err) == (0, "")
    found = json.loads(output.read_text())
    scores = found["scores"]
    assert list(scores) == list(MEASURES)
    assert all(measure.title in out for measure in MEASURES.values())
    assert found["details"]["text"]["chat_template"] is True

    checked = check_model(str(knowing_dir))
    model, tokenizer = load_model(checked, "float32", "cpu"), checked.tokenizer
    said = read_jsonl(records)
    for name, rows in ROWS.items():
        if name[:4] == "mia_":
            losses = [-fmean(log_probs(model, tokenizer, row["text"])) for row in rows]
            assert scores[f"{name}_loss"] == pytest.approx(fmean(losses), rel=1e-4)
            continue
        mine = [line for line in said if line["split"] == PARTS[name]]
        assert [line["id"] for line in mine] == [f"{PARTS[name]}-{n + 1}" for n in range(len(rows))]
        expected = []
        for row, line in zip(rows, mine, strict=True):
            prompt, opening = probe(row["query"], int(row["level"]), row["type"])  # type: ignore[arg-type]
            text = greedy(model, tokenizer, in_template(prompt) + opening, 30)
            assert line["generated"] == text
            expected.append(rouge_recall(row["answer"], text))
        assert [line["score"] for line in mine] == expected
        assert scores[PARTS[name]] == pytest.approx(fmean(expected))
    assert {0, 1} <= {line["score"] for line in said}  # it learned one of the answers, not all
    attacks = found["details"]["attacks"]
    assert set(attacks) == {"reverse query", "affirmative suffix", "incontext learning"}
    assert attacks["reverse query"] == scores["forget_level2"]  # it is put the same way
    assert scores["forget_level3"] == pytest.approx(fmean(attacks.values()))


def inputs(model: Path, **values: Any) -> Callable[[], Any]:
    return lambda: measure_by_protocol(
        ProtocolInputs(**{"model": str(model), "protocol": "rwku", **values})
    )


def test_what_is_not_given_is_null_and_no_batch_changes_a_score(
    knowing_dir: Path, given_files: dict[str, str]
) -> None:
    few = {name: given_files[name] for name in ("forget", "mia_retain")}
    found = inputs(knowing_dir, **few)().scores
    measured = {name for name, value in found.items() if value is not None}
    assert measured == {"forget_level2", "mia_retain_loss"}
    alone = inputs(knowing_dir, batch_size=1, **few)().scores
    assert [alone[name] for name in measured] == pytest.approx(
        [found[name] for name in measured], rel=1e-5
    )


def test_each_file_is_read_once(
    knowing_dir: Path, given_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    decoded = formats._decoded

    def counted(path: Path) -> str:
        read.append(str(path))
        return decoded(path)

    monkeypatch.setattr(formats, "_decoded", counted)
    inputs(knowing_dir, **given_files)()
    assert sorted(read) == sorted(given_files.values())


def test_without_the_template_a_probe_is_plain_text(
    memorised_dir: Path, given_files: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    refused = refusal(inputs(memorised_dir, forget=given_files["forget"]))
    assert "has no chat template" in refused
    assert "--chat-template off" in refused
    records = tmp_path / "r.jsonl"
    inputs(
        memorised_dir,
        **{"forget": given_files["forget"], "chat_template": "off"},
        **{"records": str(records), "reveal": True},
    )()
    model = load_model(check_model(str(memorised_dir)), "float32", "cpu")
    for row, line in zip(ROWS["forget"], records.read_text().splitlines(), strict=True):
        prompt, opening = probe(row["query"], 2)
        assert json.loads(line)["generated"] == greedy(model, tokenizer, prompt + opening, 30)


def test_a_batch_of_other_rows_is_named_with_the_file_to_give(
    knowing_dir: Path, given_files: dict[str, str], tmp_path: Path
) -> None:
    level1, level2 = given_files["forget_level1"], given_files["forget"]
    said = refusal(inputs(knowing_dir, forget=level1))
    assert said.startswith(f"{level1} row 1: is of level 1, --forget takes level 2; give RWKU's")
    said = refusal(inputs(knowing_dir, forget=level2, neighbor_level1=level2))
    assert "--neighbor-level1 takes level 1; give RWKU's neighbor_level1" in said
    said = refusal(inputs(knowing_dir, forget=level2, mia_retain=level2))
    assert said.startswith(f"{level2} row 1: has no 'text', as rows of RWKU's mia_retain have")
    for change, part, told in (
        ({"level": "hidden words"}, "forget", "is of no level that RWKU has"),
        ({"type": None}, "forget_level3", "has no 'type', as rows of RWKU's forget_level3 have"),
        ({"query": None}, "forget", "has no 'query'"),
        ({"answer": " "}, "forget", "column 'answer' is empty"),
    ):
        rows = copy.deepcopy(ROWS[part])
        rows[1] |= change
        path = tmp_path / "wrong.json"
        path.write_text(json.dumps(rows))
        said = refusal(inputs(knowing_dir, **{"forget": level2, part: str(path)}))
        assert said.startswith(f"{path} row 2: {told}")
        assert "hidden" not in said


def test_options_of_other_protocols_are_refused_and_not_recalled() -> None:
    for name in ("retain", "nonmembers", "mmlu", "columns", "oracle_scores"):
        values: dict[str, Any] = {"model": "m", "forget": "f", "protocol": "rwku", name: "x"}
        said = refusal(partial(ProtocolInputs, **values))
        assert said.startswith(f"--{name.replace('_', '-')}: is of --protocol ")
    values = {"model": "m", "forget": "f", "mia_forget": "x"}
    assert refusal(partial(ProtocolInputs, **values)).startswith("--mia-forget: is of --protocol rwku")
    assert set(_recalled(["out", "--protocol", "rwku"])) == {"forget", "long_rows"}
    assert {"columns", "joiner"} <= set(_recalled(["out", "--protocol", "muse"]))
