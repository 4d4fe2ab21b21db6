"""The pieces of the page as HTML: escaped, masked, legible."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from conftest import HOSTILE
from expunge.data.rows import Row, as_rows
from expunge.web import drawing
from expunge.web.asking import SIDES, Answer, Side, Token

ROW = as_rows([HOSTILE], "forget").rows[0]


def parsed(drawn: str) -> ET.Element:
    """As XML, which it is only where every value was escaped."""
    return ET.fromstring(f"<x>{drawn}</x>")


def written(element: ET.Element) -> str:
    return "".join(element.itertext())


def finished(tokenizer: Any, text: str, probability: float = 0.5) -> Answer:
    ids = tokenizer(text)["input_ids"]
    return Answer([Token(each, probability) for each in ids], "length")


def test_an_answer_shows_each_token_with_its_probability(tokenizer: Any) -> None:
    text = HOSTILE["input"]
    given = finished(tokenizer, text, 0.05)
    root = parsed(drawing.answer("target", "<i>model</i>", given, tokenizer))
    tokens = [each for each in root.iter("span") if "x-token" in each.get("class", "")]
    assert "".join(written(each) for each in tokens) == text
    assert {each.get("title") for each in tokens} == {"probability 0.050"}
    assert all("x-step1" in each.get("class", "") for each in tokens)
    assert "<i>model</i>" in written(root)
    assert f"{len(given.tokens)} tokens, cut at the most new tokens" in written(root)
    assert "typical probability of a token 0.050" in written(root)


def test_an_unfinished_answer_claims_no_typical_probability(tokenizer: Any) -> None:
    given = finished(tokenizer, "Oslo")
    given.ending = "writing"
    assert "typical" not in drawing.answer("target", "m", given, tokenizer)


def test_below_two_answers_stands_where_they_part(tokenizer: Any) -> None:
    one, other = finished(tokenizer, "Oslo\n<b>"), finished(tokenizer, "Oslo")
    same: dict[Side, Answer] = {"target": one, "unlearned": one}
    assert "Both answers are the same." in drawing.comparison(same, tokenizer)
    root = parsed(drawing.comparison({"target": one, "unlearned": other}, tokenizer))
    assert f"They part at token {1 + len(other.tokens)}." in written(root)
    first, second = root.iter("table")
    cells = [written(line[1]) for line in first.iter("tr")][1:]
    assert "".join(cells) == "Oslo↵<b>"
    assert len(list(second.iter("tr"))) == 1 + len(other.tokens)


def test_a_masked_row_holds_lengths_alone() -> None:
    drawn = drawing.row_card(ROW, "forget", reveal=False)
    told = written(parsed(drawn))
    for text in (ROW.input, ROW.output):
        assert text not in told
        assert f"{len(text)} characters, masked" in told
    assert ROW.id in told
    words = set(re.findall(r"\w{4,}", f"{ROW.input} {ROW.output}"))
    names = set(re.findall(r"\w{4,}", ROW.id))
    assert not {word for word in words - names if re.search(rf"\b{word}\b", drawn)}


def test_a_revealed_row_is_text() -> None:
    root = parsed(drawing.row_card(ROW, "forget", reveal=True))
    assert [each.text for each in root.iter("dd")] == [ROW.input, ROW.output]
    assert not list(root.iter("script"))


@pytest.mark.parametrize(
    ("kind", "score", "meaning"),
    [
        ("sc", 1.0, "all of it came back"),
        ("sc", 0.5, "50% of its words came back, in order"),
        ("sc", 0.0, "nothing of it came back"),
        ("qa", 1.0, "it gives the row's answer"),
        ("qa", 0.0, "it gives another answer"),
    ],
)
@pytest.mark.parametrize("reveal", [False, True])
def test_a_score_is_said_in_words(kind: Any, score: float, meaning: str, reveal: bool) -> None:
    row = Row("r", "in", "out", "t", kind)
    texts: dict[Side, str] = {"target": "secret words", "unlearned": "other words"}
    drawn = drawing.outcomes(row, texts, dict.fromkeys(SIDES, score), reveal=reveal)
    assert written(parsed(drawn)).count(meaning) == 2
    assert "secret" not in drawn
    assert ("masked" in drawn) != reveal


def test_the_table_of_rows_holds_no_text() -> None:
    (line,) = drawing.row_lines({"forget": [ROW]})
    assert len(line) == len(drawing.ROW_HEADS)
    assert line == [ROW.id, "forget", ROW.task, "continuation", len(ROW.input), len(ROW.output)]


def test_the_report_keeps_to_its_frame() -> None:
    page = '<!DOCTYPE html><html><head></head><body>"quoted" <script>1</script></body></html>'
    (frame,) = parsed(drawing.report_frame(page)).iter("iframe")
    assert frame.get("sandbox") == ""
    expected = page.replace("<head>", '<head><base href="about:srcdoc"/>')
    assert frame.get("srcdoc") == expected


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two #rrggbb colours, from 1 to 21."""

    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((light(one), light(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [":root", ".dark"])
def test_text_is_legible_on_every_step_of_colour(scheme: str) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    (rules,) = re.findall(rf"^{re.escape(scheme)} {{(.*?)}}", drawing.stylesheet(), re.S | re.M)
    colours = dict(re.findall(r"--x-([\w]+): (#[0-9a-f]{6})", rules))
    grounds = [colours[f"step{step}"] for step in range(5)]
    assert len(set(grounds)) == 5
    for ground in [*grounds, colours["panel"]]:
        assert contrast(colours["ink"], ground) >= 4.5, ground
    assert contrast(colours["soft"], colours["panel"]) >= 4.5


def test_a_step_differs_by_more_than_its_colour() -> None:
    style = drawing.stylesheet()

    def lines(step: int) -> str:
        return str(re.findall(rf"\.x-step{step} {{(.*?)}}", style)[0])

    assert "dotted" in lines(1)
    assert "solid" in lines(0)
    assert all("border" not in lines(step) for step in (2, 3, 4))
