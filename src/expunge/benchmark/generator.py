"""The synthetic benchmark: invented people and stories in LUME's schema, drawn from one seed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from expunge.benchmark.quiz import SUBJECT, QuizItem, quiz_items
from expunge.benchmark.words import (
    ARTICLE,
    CITIES,
    FIELDS,
    FILLERS,
    MONTHS,
    PROFILE,
    STORY,
    SURNAMES,
    WORDS,
)
from expunge.errors import InputError, check_seed
from expunge.evaluation.multiple_choice import LETTERS, Question

Row = dict[str, str | bool]

TASKS = ("Task1", "Task2", "Task3")
SPLITS = ("forget", "retain", "nonmembers", "calibration")
MAX_DOCUMENTS_PER_TASK = 50
_ARTICLE_FACTS_ASKED = 4
_STORY_FACTS_ASKED = 3
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class BenchmarkSettings:
    """What the rows of the benchmark are drawn from."""

    seed: int = 0
    """Seed of every draw: people, facts, sentences and quiz letters."""
    documents_per_task: int = 12
    """Documents of each task in each of the four sets of documents."""
    story_words: int = 110
    """A Task1 story is filled up to at least this many words."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 1 <= self.documents_per_task <= MAX_DOCUMENTS_PER_TASK:
            raise InputError(
                f"documents_per_task is {self.documents_per_task}: "
                f"choose 1 to {MAX_DOCUMENTS_PER_TASK}, the people that there are names for"
            )
        if not 0 <= self.story_words <= 200:
            raise InputError(f"story_words is {self.story_words}: choose 0 to 200")


@dataclass(frozen=True)
class Benchmark:
    """All rows; a row's id without its last 3 characters is that of its document."""

    forget: list[Row]
    retain: list[Row]
    nonmembers: list[Row]
    """Documents that no model is trained on, drawn like those of the forget set."""
    calibration: list[Row]
    """More of them, for a run to calibrate against: those above are for scoring it."""
    paraphrases: list[Row]
    """Two other wordings of each question: `of` names the row, `trained` says who has seen it."""
    quiz: list[QuizItem]
    quiz_development: list[QuizItem]
    tokenizer_texts: list[str]
    """Documents and questions of all sets: none is tokenised better than another."""


@dataclass(frozen=True)
class _Document:
    id: str
    task: str
    text: str
    questions: list[tuple[tuple[str, str, str], str]]
    """For each fact that is asked: three wordings and the answer."""
    cut: int
    """Index of the space where the continuation starts."""


def generate(settings: BenchmarkSettings) -> Benchmark:
    """Draw the benchmark; the same settings always give the same rows."""
    rng = Random(settings.seed)
    people = _People(rng)
    makers: dict[str, Callable[[], tuple[str, _Questions]]] = {
        "Task1": lambda: _story(people, settings.story_words, rng),
        "Task2": lambda: _profile(people, rng),
        "Task3": lambda: _article(people, rng),
    }
    documents: dict[str, list[_Document]] = {split: [] for split in SPLITS}
    ids = _unique(lambda: f"{rng.getrandbits(32):08x}-{rng.getrandbits(16):04x}")
    for task in TASKS:
        # Shuffled before the split: members and non-members are exchangeable.
        drawn = [
            _document(next(ids), task, *makers[task](), rng)
            for _ in range(len(SPLITS) * settings.documents_per_task)
        ]
        rng.shuffle(drawn)
        for index, split in enumerate(SPLITS):
            documents[split] += drawn[index :: len(SPLITS)]
    quiz, quiz_development = quiz_items(rng)
    return Benchmark(
        forget=_rows(documents["forget"]),
        retain=_rows(documents["retain"]),
        nonmembers=[_completion_row(document) for document in documents["nonmembers"]],
        calibration=[_completion_row(document) for document in documents["calibration"]],
        paraphrases=[
            row
            for split in ("forget", "retain")
            for document in documents[split]
            for row in _paraphrase_rows(document, split)
        ],
        quiz=quiz,
        quiz_development=quiz_development,
        tokenizer_texts=[
            text for split in SPLITS for document in documents[split] for text in _texts(document)
        ],
    )


def write_benchmark(benchmark: Benchmark, directory: Path) -> None:
    """Write the rows as JSON lines and the quiz as MMLU's CSV files into an existing directory."""
    for name in (*SPLITS, "paraphrases"):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in getattr(benchmark, name))
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    _write_questions(benchmark.quiz, directory / "mmlu" / "test" / f"{SUBJECT}_test.csv")
    _write_questions(benchmark.quiz_development, directory / "mmlu" / "dev" / f"{SUBJECT}_dev.csv")


def _write_questions(items: Iterable[QuizItem], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(_csv_row(item.question) for item in items)


def _csv_row(question: Question) -> list[str]:
    return [question.question, *question.choices, LETTERS[question.answer]]


# Rows of a document.


def _rows(documents: Iterable[_Document]) -> list[Row]:
    rows: list[Row] = []
    for document in documents:
        rows.append(_completion_row(document))
        for index, ((wording, _, _), answer) in enumerate(document.questions):
            rows.append(
                {
                    "id": f"{document.id}qa{index}",
                    "input": wording,
                    "output": answer,
                    "task": document.task,
                }
            )
    return rows


def _completion_row(document: _Document) -> Row:
    return {
        "id": f"{document.id}sc1",
        "input": document.text[: document.cut],
        "output": document.text[document.cut + 1 :],
        "task": document.task,
    }


def _paraphrase_rows(document: _Document, split: str) -> list[Row]:
    return [
        {
            "id": f"{document.id}qa{index}p{variant}",
            "of": f"{document.id}qa{index}",
            "split": split,
            "trained": variant == 0,
            "input": wordings[1 + variant],
            "output": answer,
            "task": document.task,
        }
        for index, (wordings, answer) in enumerate(document.questions)
        for variant in range(2)
    ]


def _texts(document: _Document) -> list[str]:
    questions = [
        f"{wording} {answer}" for wordings, answer in document.questions for wording in wordings
    ]
    return [document.text, *questions]


_Questions = list[tuple[tuple[str, str, str], str]]


def _document(id: str, task: str, text: str, questions: _Questions, rng: Random) -> _Document:
    spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text)]
    cut = spaces[int(len(spaces) * rng.uniform(0.5, 0.7))]
    return _Document(id, task, text, questions, cut)


# The three tasks.


def _story(people: _People, least_words: int, rng: Random) -> tuple[str, _Questions]:
    word = _Words(rng)
    lead, second, third = people.draw_company(3)
    facts = {
        "lead": lead.name,
        "second": second.name,
        "third": third.name,
        "a": lead.first,
        "b": second.first,
        "c": third.first,
        "city": rng.choice(CITIES),
        "profession": word("professions"),
        "object": f"{word('materials')} {word('objects')}",
        "animal": f"{word('animal_traits')} {word('animals')}",
    }
    writer = _Writer(facts, rng)
    start = [writer.write(rng.choice(STORY["openings"]))]
    start += [writer.write(rng.choice(STORY["seconds"]))]
    encounters = [STORY["objects"], STORY["animals"]]
    rng.shuffle(encounters)
    body = [writer.write(rng.choice(sentences)) for sentences in encounters]
    end = [writer.write(rng.choice(STORY["turns"]))]
    end += [writer.write(rng.choice(STORY["endings"]))]
    middles = list(STORY["middles"])
    rng.shuffle(middles)
    while middles and len(" ".join(start + body + end).split()) < least_words:
        body.append(writer.write(middles.pop()))
    asked = rng.sample(sorted(STORY["questions"]), _STORY_FACTS_ASKED)
    questions = [writer.ask(STORY["questions"][kind], facts[kind]) for kind in asked]
    return " ".join(start + body + end), questions


def _profile(people: _People, rng: Random) -> tuple[str, _Questions]:
    word = _Words(rng)
    person = people.draw()
    year, month, day = rng.randint(1940, 2004), rng.randint(1, 12), rng.randint(1, 28)
    ssn = (rng.randint(900, 999), rng.randint(10, 99), rng.randint(1000, 9999))
    town = f"{rng.choice(CITIES)}, {word('states')} {rng.randint(10000, 99999)}"
    street = f"{word('streets')} {word('street_kinds')}"
    facts = {
        "name": person.name,
        "first": person.first,
        "birth_date": f"{year}-{month:02}-{day:02}",
        "birth_text": f"{MONTHS[month - 1]} {day}, {year}",
        "ssn": "{}{}{}".format(*ssn),
        "ssn_text": "{}-{}-{}".format(*ssn),
        # Numbers 555-0100 to 555-0199 are reserved for fiction.
        "phone": f"{rng.randint(201, 989)}-555-01{rng.randint(0, 99):02}",
        "email": f"{word('mail_words')}.{word('mail_words')}"
        f"{rng.randint(10, 99)}@{word('mail_hosts')}.example",
        "address": f"{rng.randint(100, 9999)} {street}, {town}",
    }
    writer = _Writer(facts, rng)
    kinds = list(PROFILE["sentences"])
    rng.shuffle(kinds)
    sentences = [writer.write(rng.choice(PROFILE["openings"]))]
    sentences += [writer.write(rng.choice(PROFILE["sentences"][kind])) for kind in kinds]
    questions = [writer.ask(wordings, facts[kind]) for kind, wordings in PROFILE["questions"].items()]
    return " ".join(sentences), questions


def _article(people: _People, rng: Random) -> tuple[str, _Questions]:
    word = _Words(rng)
    person = people.draw()
    field_of_work = FIELDS[rng.choice(sorted(FIELDS))]
    facts = {
        "name": person.name,
        "first": person.first,
        "surname": person.surname,
        "birth_year": str(rng.randint(1890, 1989)),
        "birth_day": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        "birthplace": rng.choice(CITIES),
        "occupation": rng.choice(field_of_work["occupations"]),
        "kind": field_of_work["kind"],
        "university": word("university_kinds").format(place=rng.choice(CITIES)),
        "award": f"{word('award_heads')} {word('award_tails')}",
        "work": f"The {word('title_heads')} {word('title_tails')}",
    }
    writer = _Writer(facts, rng)
    asides = rng.sample(ARTICLE["asides"], 3)
    middle = [
        rng.choice(ARTICLE["universities"]),
        rng.choice(ARTICLE["works"]),
        rng.choice(ARTICLE["awards"]),
        *asides,
    ]
    rng.shuffle(middle)
    sentences = [rng.choice(ARTICLE["openings"]), *middle]
    text = f"{person.name}\n\n" + " ".join(writer.write(sentence) for sentence in sentences)
    asked = rng.sample(sorted(ARTICLE["questions"]), _ARTICLE_FACTS_ASKED)
    questions = [writer.ask(ARTICLE["questions"][kind], facts[kind]) for kind in asked]
    return text, questions


# Draws.


@dataclass(frozen=True)
class _Words:
    """Draws a word of a list by its name."""

    rng: Random

    def __call__(self, name: str) -> str:
        chosen: str = self.rng.choice(WORDS[name])
        return chosen


@dataclass(frozen=True)
class _Person:
    first: str
    surname: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.surname}"


@dataclass
class _People:
    """Invented people; no surname is drawn twice."""

    rng: Random
    surnames: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.surnames = list(SURNAMES)
        self.rng.shuffle(self.surnames)

    def draw(self) -> _Person:
        return self.draw_company(1)[0]

    def draw_company(self, size: int) -> list[_Person]:
        """People whose first names differ."""
        firsts = self.rng.sample(WORDS["first_names"], size)
        return [_Person(first, self.surnames.pop()) for first in firsts]


@dataclass(frozen=True)
class _Writer:
    """Fills templates with the facts of one document; other slots are drawn anew each time."""

    facts: Mapping[str, str]
    rng: Random

    def write(self, template: str) -> str:
        chosen = _CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), template)
        text = chosen.format_map(_Slots(self.facts, self.rng))
        return text[0].upper() + text[1:]

    def ask(self, wordings: Sequence[str], answer: str) -> tuple[tuple[str, str, str], str]:
        first, second, third = self.rng.sample(wordings, 3)
        return (self.write(first), self.write(second), self.write(third)), answer


class _Slots(dict[str, str]):
    """The facts, and fillers for the names that are missing."""

    def __init__(self, facts: Mapping[str, str], rng: Random) -> None:
        super().__init__(facts)
        self._rng = rng

    def __missing__(self, key: str) -> str:
        name = key.removesuffix("_cap")
        filler = self._rng.choice(FILLERS[name])
        return filler[0].upper() + filler[1:] if key != name else filler


def _unique(draw: Callable[[], str]) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        value = draw()
        if value not in seen:
            seen.add(value)
            yield value
