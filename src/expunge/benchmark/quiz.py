"""Four-choice questions of true general knowledge, each with the plain statement of its fact."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from expunge.benchmark.words import read
from expunge.evaluation.multiple_choice import Question

SUBJECT = "general_facts"


@dataclass(frozen=True)
class QuizItem:
    """A question and its fact as a statement."""

    question: Question
    statement: str


@dataclass(frozen=True)
class _Category:
    question: str
    statement: str
    facts: dict[str, str]


_QUIZ = read("quiz")
_CATEGORIES = [_Category(**category) for category in _QUIZ["categories"]]


def quiz_items(rng: Random) -> tuple[list[QuizItem], list[QuizItem]]:
    """The test questions and the development questions, the letters balanced within each list."""
    facts = [(category, key) for category in _CATEGORIES for key in category.facts]
    test = [fact for fact in facts if fact[1] not in _QUIZ["development"]]
    development = [fact for fact in facts if fact[1] in _QUIZ["development"]]
    return _items(test, rng), _items(development, rng)


def _items(facts: list[tuple[_Category, str]], rng: Random) -> list[QuizItem]:
    answers = [index % 4 for index in range(len(facts))]
    rng.shuffle(answers)
    items = [_item(*fact, answer, rng) for fact, answer in zip(facts, answers, strict=True)]
    rng.shuffle(items)
    return items


def _item(category: _Category, key: str, answer: int, rng: Random) -> QuizItem:
    value = category.facts[key]
    choices = rng.sample(sorted(set(category.facts.values()) - {value}), 3)
    choices.insert(answer, value)
    first, second, third, fourth = choices
    question = category.question.format(key=key)
    statement = category.statement.format(key=key, value=value)
    return QuizItem(
        Question(SUBJECT, question, (first, second, third, fourth), answer),
        statement[0].upper() + statement[1:],
    )
