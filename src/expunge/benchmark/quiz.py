"""Four-choice questions of true general knowledge, each with the plain statement of its fact."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

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


_CATEGORIES = (
    _Category(
        "What is the capital of {key}?",
        "The capital of {key} is {value}.",
        {
            "France": "Paris",
            "Japan": "Tokyo",
            "Egypt": "Cairo",
            "Canada": "Ottawa",
            "Peru": "Lima",
            "Kenya": "Nairobi",
            "Norway": "Oslo",
            "Greece": "Athens",
            "Cuba": "Havana",
            "Portugal": "Lisbon",
            "Poland": "Warsaw",
            "Thailand": "Bangkok",
            "Spain": "Madrid",
        },
    ),
    _Category(
        "What is the chemical symbol of {key}?",
        "The chemical symbol of {key} is {value}.",
        {
            "gold": "Au",
            "silver": "Ag",
            "iron": "Fe",
            "sodium": "Na",
            "lead": "Pb",
            "helium": "He",
            "carbon": "C",
            "tin": "Sn",
            "mercury": "Hg",
        },
    ),
    _Category(
        "Who wrote {key}?",
        "{value} wrote {key}.",
        {
            "Hamlet": "William Shakespeare",
            "War and Peace": "Leo Tolstoy",
            "Don Quixote": "Miguel de Cervantes",
            "The Odyssey": "Homer",
            "Faust": "Goethe",
            "Emma": "Jane Austen",
            "Oliver Twist": "Charles Dickens",
            "The Trial": "Franz Kafka",
            "Les Miserables": "Victor Hugo",
        },
    ),
    _Category(
        "What is a young {key} called?",
        "A young {key} is called a {value}.",
        {
            "cat": "kitten",
            "dog": "puppy",
            "cow": "calf",
            "sheep": "lamb",
            "horse": "foal",
            "duck": "duckling",
            "swan": "cygnet",
            "bear": "cub",
            "kangaroo": "joey",
        },
    ),
    _Category(
        "What is {key}?",
        "{key} is {value}.",
        {
            "7 times 8": "56",
            "9 plus 6": "15",
            "12 times 12": "144",
            "100 minus 37": "63",
            "81 divided by 9": "9",
            "25 plus 17": "42",
            "6 times 5": "30",
            "half of 46": "23",
        },
    ),
    _Category(
        "Which language is spoken by most people in {key}?",
        "Most people in {key} speak {value}.",
        {
            "Brazil": "Portuguese",
            "Mexico": "Spanish",
            "Austria": "German",
            "Iran": "Persian",
            "Italy": "Italian",
            "Turkey": "Turkish",
            "Hungary": "Hungarian",
            "Vietnam": "Vietnamese",
        },
    ),
    _Category(
        "What does a {key} measure?",
        "A {key} measures {value}.",
        {
            "thermometer": "temperature",
            "barometer": "air pressure",
            "clock": "time",
            "odometer": "distance travelled",
            "seismograph": "earthquakes",
            "hygrometer": "humidity",
            "anemometer": "wind speed",
            "ammeter": "electric current",
            "altimeter": "height",
        },
    ),
)
_DEVELOPMENT_KEYS = ("Spain", "mercury", "Les Miserables", "kangaroo", "altimeter")


def quiz_items(rng: Random) -> tuple[list[QuizItem], list[QuizItem]]:
    """The test questions and the development questions, the letters balanced within each list."""
    facts = [(category, key) for category in _CATEGORIES for key in category.facts]
    test = [fact for fact in facts if fact[1] not in _DEVELOPMENT_KEYS]
    development = [fact for fact in facts if fact[1] in _DEVELOPMENT_KEYS]
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
