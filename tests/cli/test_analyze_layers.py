"""`expunge analyze layers` end to end: what it prints and writes, the figure, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from expunge.evaluation import generation

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 20)


@pytest.fixture
def analyze(memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli) -> Cli:
    def call(*options: object) -> tuple[int, str, str]:
        return run_cli(
            *("analyze", "layers", memorised_dir, "--device", "cpu"),
            *("--forget", row_files["forget"], "--retain", row_files["retain"], *options),
        )

    return call


def test_the_prediction_is_a_table_with_the_choice(analyze: Cli, tmp_path: Path) -> None:
    code, out, err = analyze("--predict-only", "--quiet")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["layer", "score", "decodable"] in [line[:3] for line in lines]
    code, as_json, _ = analyze("--predict-only", "--quiet", "--json")
    choice = json.loads(as_json)
    assert f"--method.layer auto: {choice['layer']} (highest score" in out
    for reading in choice["readings"]:
        mark = ["*"] if reading["layer"] == choice["layer"] else []
        assert [str(reading["layer"]), *mark, f"{reading['score']:.3f}"] in [
            line[: 2 + len(mark)] for line in lines
        ]
    assert list(tmp_path.iterdir()) == []


class Loads(HTMLParser):
    """Everything in a page that names an address."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "srcset")]


def test_a_sweep_prints_a_table_and_writes_one_page_that_loads_nothing(
    analyze: Cli,
    quiz_dir: Path,
    row_files: dict[str, Path],
    tmp_path: Path,
    forget_rows: list[dict[str, str]],
) -> None:
    out_dir = tmp_path / "out"
    code, out, err = analyze(
        *("--output", out_dir, "--epochs", 2, "--learning-rate", 1e-3, "--mmlu", quiz_dir),
        *("--nonmembers", row_files["nonmembers"]),
    )
    assert code == 0, err
    written = json.loads((out_dir / "layers.json").read_text())
    for layer in written["layers"]:
        assert layer["scores"]["final_score"] == pytest.approx(layer["value"])
        assert f"{layer['scores']['final_score']:.3f}" in out
        assert f"{layer['scores']['utility']:.3f}" in out
    best = written["agreement"]["best"]
    assert f"Best by final score: layer {best}." in out
    assert "rank correlation" in out
    page = (out_dir / "layers.html").read_text(encoding="utf-8")
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert "default-src 'none'" in page
    for words in ("predicted score", "task aggregate", "MIA score", "utility", "decodable"):
        assert words in page
    assert "prefers-color-scheme: dark" in page
    for row in forget_rows:
        for column in ("input", "output"):
            assert row[column] not in page + out + err
    code, again, _ = analyze(
        *("--output", out_dir, "--epochs", 2, "--learning-rate", 1e-3, "--mmlu", quiz_dir),
        *("--nonmembers", row_files["nonmembers"], "--resume", "--quiet", "--json"),
    )
    assert code == 0
    assert json.loads(again) == written
    assert (out_dir / "layers.html").read_text(encoding="utf-8") == page


def test_a_preset_is_swept_in_the_place_of_its_layer(analyze: Cli) -> None:
    code, out, err = analyze("--predict-only", "--quiet", "--preset", "semeval-7b")
    assert (code, err) == (0, "")
    assert "--method.layer auto:" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--output: is needed"),
        (("--output", "{out}", "--layers", "9"), "--layers 9: the model has the layers 0 to 3"),
        (("--output", "{out}", "--method", "libu"), "--method libu: steers no layer"),
        (("--output", "{out}", "--layer", "2"), "did you mean --layers"),
    ],
    ids=str,
)
def test_wrong_options_end_with_2_and_one_line(
    options: tuple[str, ...], words: str, analyze: Cli, tmp_path: Path
) -> None:
    code, out, err = analyze(*(option.format(out=tmp_path / "out") for option in options))
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_knows_its_subcommands(run_cli: Cli) -> None:
    code, out, _ = run_cli("analyze", "--help")
    assert code == 0
    assert "layers" in out
    code, _, err = run_cli("analyze", "layer")
    assert code == 2
    assert "analyze layer: no such subcommand; write expunge analyze layers MODEL" in err
    code, out, _ = run_cli("analyze", "layers", "--help")
    assert code == 0
    for option in ("--predict-only", "--every", "--layers", "--method.beta", "--mmlu", "--keep"):
        assert option in out
