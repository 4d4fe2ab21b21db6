"""What is counted of pages and of what the package says."""

from __future__ import annotations

import ast

import pytest

import prose


def test_a_page_is_counted_without_code_tables_and_headings() -> None:
    page = (
        "# A head\n\nOne two. `Three` four\nfive.\n\n    code here\n\n"
        "| a | b |\n\n- six\n- seven [e](x.md)\n"
    )
    found = [len(words) for words in prose.sentences(page)]
    assert found == [2, 3, 1, 2]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('f"--{x}: is" f" {y} long"', ["--{}: is {} long"]),
        ('def f(a: "hint") -> "hint":\n    """Not this."""\n    return "this"', ["this"]),
        ('raise InputError("a; b")', ["a; b"]),
    ],
)
def test_texts_are_strings_but_no_docstrings_and_no_annotations(code: str, expected: list[str]) -> None:
    assert list(prose.texts(ast.parse(code))) == expected


def test_what_is_put_in_is_a_word_and_lists_of_words_are_no_prose() -> None:
    (words,) = prose.sentences(prose.running("{}: holds {} rows; give one"))
    assert len(words) == 6
    assert prose.running("a an and as at") == ""
    assert prose.running("CREATE TABLE x (y TEXT, z TEXT)") == ""
    assert prose.running("Does this.\n\nExamples:\n  expunge run, and more") == "Does this.\n\n"


def test_help_errors_and_findings_are_found() -> None:
    said = {kind: [text for _, texts in found for text in texts] for kind, found in prose.said().items()}
    assert set(said) == {"help", "errors", "other texts", "templates"}
    assert "Seed of every random draw." in said["help"]
    refused = "--reveal: adds text to audit.json; give --output FILE"
    assert (refused in said["errors"], refused in said["other texts"]) == (True, False)
    assert "no attack had power on the target, so nothing can be said" in said["other texts"]
