from __future__ import annotations

import json
import re
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from expunge.benchmark.generator import (
    TASKS,
    Benchmark,
    BenchmarkSettings,
    Row,
    generate,
    write_benchmark,
)
from expunge.benchmark.words import MONTHS, SURNAMES
from expunge.errors import InputError
from expunge.evaluation.multiple_choice import LETTERS, read_questions

QUESTIONS = {"Task1": 3, "Task2": 5, "Task3": 4}


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    return generate(BenchmarkSettings())


def row_text(row: Row) -> str:
    """The full text of a row."""
    return f"{row['input']} {row['output']}"


def is_document(row: Row) -> bool:
    return str(row["id"])[:-1].endswith("sc")


def document_of(row: Row, rows: list[Row]) -> str:
    identity = str(row["id"])[:-3]
    return next(row_text(other) for other in rows if other["id"] == f"{identity}sc1")


def test_same_seed_same_rows_other_seed_other_rows(benchmark: Benchmark) -> None:
    assert generate(BenchmarkSettings()) == benchmark
    other = generate(BenchmarkSettings(seed=1))
    texts = {row_text(row) for row in benchmark.forget + benchmark.retain}
    assert texts.isdisjoint(row_text(row) for row in other.forget + other.retain)


def test_rows_have_lumes_schema(benchmark: Benchmark) -> None:
    for rows in (benchmark.forget, benchmark.retain):
        assert all(set(row) == {"id", "input", "output", "task"} for row in rows)
        assert all(re.search(r"(sc1|qa\d)$", str(row["id"])) for row in rows)
        documents = Counter(row["task"] for row in rows if is_document(row))
        questions = Counter(row["task"] for row in rows if not is_document(row))
        assert documents == dict.fromkeys(TASKS, 12)
        assert questions == {task: 12 * count for task, count in QUESTIONS.items()}
    assert all(is_document(row) for row in benchmark.nonmembers)
    assert len(benchmark.nonmembers) == 36


def test_texts_join_with_one_space(benchmark: Benchmark) -> None:
    for row in benchmark.forget + benchmark.retain + benchmark.nonmembers + benchmark.paraphrases:
        for part in (str(row["input"]), str(row["output"])):
            assert part
            assert part == part.strip()
        assert not re.search(r" {2}|[{}\[\]|]", row_text(row))


def test_stories_have_their_length(benchmark: Benchmark) -> None:
    stories = [row for row in benchmark.forget if row["task"] == "Task1" and is_document(row)]
    assert all(100 <= len(row_text(story).split()) <= 155 for story in stories)


def test_ids_and_texts_are_unique(benchmark: Benchmark) -> None:
    rows = benchmark.forget + benchmark.retain + benchmark.nonmembers + benchmark.paraphrases
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row_text(row) for row in rows}) == len(rows)


def test_sets_share_no_person(benchmark: Benchmark) -> None:
    def surnames(rows: list[Row]) -> set[str]:
        words = {word for row in rows for word in re.findall(r"[A-Z]\w+", row_text(row))}
        return words & set(SURNAMES)

    forget = surnames(benchmark.forget)
    retain = surnames(benchmark.retain)
    nonmembers = surnames(benchmark.nonmembers)
    # Three people a story, one a biography.
    assert len(forget) == len(retain) == len(nonmembers) == 12 * 5
    assert not forget & retain
    assert not forget & nonmembers
    assert not retain & nonmembers


def test_answers_stand_in_their_documents(benchmark: Benchmark) -> None:
    for rows in (benchmark.forget, benchmark.retain):
        for row in rows:
            if not is_document(row):
                answer = str(row["output"])
                if re.fullmatch(r"9\d{8}", answer):
                    answer = f"{answer[:3]}-{answer[3:5]}-{answer[5:]}"
                if re.fullmatch(r"\d{4}-\d\d-\d\d", answer):
                    day = date.fromisoformat(answer)
                    answer = f"{MONTHS[day.month - 1]} {day.day}, {day.year}"
                assert answer in document_of(row, rows)


def test_questions_name_somebody(benchmark: Benchmark) -> None:
    surnames = set(SURNAMES)
    rows = benchmark.forget + benchmark.retain + benchmark.paraphrases
    assert all(surnames & set(re.findall(r"\w+", str(row["input"]))) for row in rows)


def test_every_question_has_two_paraphrases(benchmark: Benchmark) -> None:
    paraphrases = {str(row["id"]): row for row in benchmark.paraphrases}
    questions = [
        (split, row)
        for split, rows in (("forget", benchmark.forget), ("retain", benchmark.retain))
        for row in rows
        if not is_document(row)
    ]
    assert len(paraphrases) == 2 * len(questions)
    for split, row in questions:
        first, second = (paraphrases[f"{row['id']}p{variant}"] for variant in range(2))
        assert (first["trained"], second["trained"]) == (True, False)
        assert len({row["input"], first["input"], second["input"]}) == 3
        for paraphrase in (first, second):
            assert paraphrase["of"] == row["id"]
            assert paraphrase["split"] == split
            assert paraphrase["output"] == row["output"]
            assert paraphrase["task"] == row["task"]


def test_articles_fit_their_nouns() -> None:
    rows = generate(BenchmarkSettings(seed=2, documents_per_task=50)).retain
    text = " ".join(row_text(row) for row in rows)
    assert not re.search(r"\b[Aa] [aeiou]", text)
    assert not re.search(r"\b[Aa]n [^aeiou]", text)


def test_quiz_is_balanced_and_consistent(benchmark: Benchmark) -> None:
    questions = [item.question for item in benchmark.quiz]
    assert Counter(question.answer for question in questions) == dict.fromkeys(range(4), 15)
    assert all(len(set(question.choices)) == 4 for question in questions)
    for item in benchmark.quiz + benchmark.quiz_development:
        right = item.question.choices[item.question.answer]
        assert right.casefold() in item.statement.casefold()
    wordings = [item.question.question for item in benchmark.quiz + benchmark.quiz_development]
    assert len(benchmark.quiz_development) == 5
    assert len(set(wordings)) == len(wordings)


def test_written_files_read_back(benchmark: Benchmark, tmp_path: Path) -> None:
    write_benchmark(benchmark, tmp_path)
    for name in ("forget", "retain", "nonmembers", "paraphrases"):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == getattr(benchmark, name)
    questions, examples = read_questions(tmp_path / "mmlu", shots=5)
    assert questions == [item.question for item in benchmark.quiz]
    assert examples["general_facts"] == [item.question for item in benchmark.quiz_development]
    first = (tmp_path / "mmlu" / "test" / "general_facts_test.csv").read_text().splitlines()[0]
    assert first.endswith(f",{LETTERS[questions[0].answer]}")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"documents_per_task": 0}, "documents_per_task"),
        ({"documents_per_task": 51}, "documents_per_task"),
        ({"story_words": 1000}, "story_words"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], name: str) -> None:
    with pytest.raises(InputError, match=name):
        BenchmarkSettings(**settings)
