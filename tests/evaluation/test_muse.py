"""MUSE's formulas against slow references, and `--protocol muse` end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import read_jsonl, refusal, write_jsonl
from expunge.evaluation.muse import first_answer, privleak, privleak_auc, solved_prompt
from expunge.evaluation.protocols.inputs import ProtocolInputs
from expunge.evaluation.protocols.measuring import measure_by_protocol
from expunge.evaluation.protocols.muse import MEASURES
from expunge.evaluation.scores import rouge_f1
from expunge.models.loading import check_model, load_model
from slow import greedy, log_probs

Lines = list[dict[str, str]]


def longest_common(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + longest_common(first[1:], second[1:])
    return max(longest_common(first[1:], second), longest_common(first, second[1:]))


words = st.lists(st.sampled_from(["runs", "running", "a", "b"]), min_size=1, max_size=6)


@given(words, words)
def test_rouge_f1_is_that_of_the_longest_common_words_unstemmed(
    reference: list[str], text: list[str]
) -> None:
    common = longest_common(reference, text)
    expected = 2 * common / (len(reference) + len(text))
    assert rouge_f1(" ".join(reference), " ".join(text)) == pytest.approx(expected)


def test_rouge_f1_of_other_scripts_and_of_nothing() -> None:
    assert rouge_f1("北京 大学", "北京") == pytest.approx(2 * 2 / (4 + 2))
    assert rouge_f1("Paris", "") == 0
    assert rouge_f1("é!", "é") == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris\n\nQuestion: Who?", " Paris"),
        (" Paris\nQuestion: Who?", " Paris"),
        (" Paris Question: Who?", " Paris "),
        (" Paris\nand more", " Paris\nand more"),
        ("\n\nParis", ""),
    ],
)
def test_an_answer_ends_before_a_blank_line_or_a_question(text: str, answer: str) -> None:
    assert first_answer(text) == answer


def test_solved_questions_stand_before_the_one_that_is_asked() -> None:
    prompt = solved_prompt([("Who?", "Ada"), ("Where?", "Oslo")], "When?")
    assert prompt == (
        "Question: Who?\nAnswer: Ada\n\nQuestion: Where?\nAnswer: Oslo\n\nQuestion: When?\nAnswer: "
    )
    assert solved_prompt([], "When?") == "Question: When?\nAnswer: "


numbers = st.lists(st.floats(-20, 0), min_size=1, max_size=6)


@given(numbers, numbers)
def test_privleak_counts_pairs(forget: list[float], holdout: list[float]) -> None:
    pairs = [(mine < theirs) + (mine == theirs) / 2 for mine in forget for theirs in holdout]
    auc = privleak_auc(forget, holdout)
    assert auc == pytest.approx(fmean(pairs))
    assert privleak(auc) == pytest.approx(200 * auc - 100)


def test_privleak_at_its_limits() -> None:
    assert privleak(privleak_auc([-0.1, -0.2], [-3.0, -4.0])) == -100  # as the target
    assert privleak(privleak_auc([-9.0, -8.0], [-3.0, -4.0])) == 100
    assert privleak(0.4, 0.4) == 0
    assert privleak(0.6, 0.4) == pytest.approx(50)


# On a model.


@pytest.fixture
def given_files(
    tmp_path: Path, forget_rows: Lines, retain_rows: Lines, nonmember_rows: Lines
) -> dict[str, str]:
    def asked(rows: Lines) -> Lines:
        return [
            {"question": row["input"], "answer": row["output"]}
            for row in rows
            if row["id"].endswith("qa0")
        ]

    documents = [row for row in forget_rows if row["id"].endswith("sc1")]
    solved = [{"question": "Who is it?", "answer": "Ada"}, {"question": "Or?", "answer": "Ben"}]
    rows = {
        "forget": [{"prompt": row["input"], "gt": row["output"]} for row in documents],
        "forget_questions": asked(forget_rows),
        "forget_solved": solved,
        "retain_questions": asked(retain_rows),
        "retain_solved": solved[:1],
        "members": [{"text": f"{row['input']} {row['output']}"} for row in documents],
        "nonmembers": [{"text": f"{row['input']} {row['output']}"} for row in nonmember_rows],
    }
    return {name: str(write_jsonl(tmp_path / f"{name}.jsonl", each)) for name, each in rows.items()}


def slow_lowest(model: Any, tokenizer: Any, text: str) -> float:
    values = sorted(log_probs(model, tokenizer, text))
    return fmean(values[: int(0.4 * len(values))])


def test_muse_end_to_end(
    memorised_dir: Path,
    tokenizer: Any,
    given_files: dict[str, str],
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    output, records = tmp_path / "s.json", tmp_path / "r.jsonl"
    options = [f"--{name.replace('_', '-')}={path}" for name, path in given_files.items()]
    code, out, err = run_cli(
        *("evaluate", memorised_dir, "--protocol", "muse", "--quiet", *options),
        *("--output", output, "--records", records, "--reveal"),
    )
    assert (code, err) == (0, "")
    scores = json.loads(output.read_text())["scores"]
    assert list(scores) == list(MEASURES)
    assert "-100 to inf" in next(line for line in out.splitlines() if "PrivLeak" in line)
    assert scores["verbmem"] == scores["forget_extraction_strength"] == 1

    model = load_model(check_model(str(memorised_dir)), "float32", "cpu")
    said = read_jsonl(records)
    for side in ("forget", "retain"):
        solved = [
            (row["question"], row["answer"]) for row in read_jsonl(Path(given_files[f"{side}_solved"]))
        ]
        expected = []
        for row in read_jsonl(Path(given_files[f"{side}_questions"])):
            prompt = solved_prompt(solved, row["question"])
            text = first_answer(greedy(model, tokenizer, prompt, 32))
            expected.append(rouge_f1(row["answer"], text))
        mine = [line["score"] for line in said if line["split"] == f"{side} questions"]
        assert mine == pytest.approx(expected)
        assert scores[f"knowmem_{side}"] == pytest.approx(fmean(expected))
    lowest = [
        [slow_lowest(model, tokenizer, row["text"]) for row in read_jsonl(Path(given_files[name]))]
        for name in ("members", "nonmembers")
    ]
    assert scores["privleak_auc"] == pytest.approx(privleak_auc(*lowest))
    assert scores["privleak"] == pytest.approx(privleak(scores["privleak_auc"]))
    assert scores["privleak"] < -50  # it knows its members


def test_what_is_not_given_is_null_and_an_oracle_sets_the_scale(
    memorised_dir: Path, oracle_dir: Path, given_files: dict[str, str], tmp_path: Path
) -> None:
    def measured(model: Path, *names: str, **more: str) -> Any:
        chosen: dict[str, Any] = {name: given_files[name] for name in ("forget", *names)}
        values: dict[str, Any] = {"model": str(model), "protocol": "muse", **chosen, **more}
        return measure_by_protocol(ProtocolInputs(**values)).scores

    found = measured(memorised_dir)
    assert {name for name, value in found.items() if value is None} == {
        *("knowmem_forget", "knowmem_retain", "privleak", "privleak_auc"),
    }
    output = str(tmp_path / "o.json")
    oracle = measured(oracle_dir, "members", "nonmembers", output=output)
    found = measured(memorised_dir, "members", "nonmembers", oracle_scores=output)
    assert found["privleak"] == pytest.approx(privleak(found["privleak_auc"], oracle["privleak_auc"]))


def test_a_true_continuation_is_cut_to_what_is_written(
    memorised_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from expunge.data.rows import Row
    from expunge.evaluation.protocols.muse import _cut

    text = " ".join(f"word{n}" for n in range(100))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 128
    assert _cut(Row("a", "x", text), tokenizer).output == tokenizer.decode(ids[:128])
    assert _cut(Row("a", "x", "short"), tokenizer).output == "short"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"forget_questions": "q"}, "--forget-questions: needs --forget-solved"),
        ({"retain_solved": "q"}, "--retain-solved: goes with --retain-questions"),
        ({"nonmembers": "n"}, "--nonmembers: goes with --members"),
        ({"oracle_scores": "o"}, "--oracle-scores: needs --nonmembers"),
    ],
)
def test_options_that_go_together(
    options: dict[str, str], said: str, memorised_dir: Path, given_files: dict[str, str]
) -> None:
    values: dict[str, Any] = {
        "model": str(memorised_dir),
        "forget": given_files["forget"],
        **options,
    }
    inputs = ProtocolInputs(protocol="muse", **values)
    assert refusal(partial(measure_by_protocol, inputs)).startswith(said)


def test_options_of_other_protocols_and_the_template_are_refused() -> None:
    for name, value in (("retain", "r"), ("mmlu", "m"), ("world_facts", "w")):
        values: dict[str, Any] = {"model": "m", "forget": "f", "protocol": "muse", name: value}
        assert refusal(partial(ProtocolInputs, **values)).startswith(
            f"--{name.replace('_', '-')}: is of"
        )
    values = {"model": "m", "forget": "f", "protocol": "muse", "chat_template": "on"}
    assert "whose prompts are plain" in refusal(partial(ProtocolInputs, **values))
    assert ProtocolInputs(model="m", forget="f", protocol="muse").chat_template == "off"
