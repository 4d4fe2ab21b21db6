"""`expunge analyze layers`: what it prints and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    code, out, err = analyze("--quiet")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["layer", "score", "decodable"] in [line[:3] for line in lines]
    code, as_json, _ = analyze("--quiet", "--json")
    choice = json.loads(as_json)
    assert f"--method.layer auto: {choice['layer']} (highest score" in out
    for reading in choice["readings"]:
        mark = ["*"] if reading["layer"] == choice["layer"] else []
        assert [str(reading["layer"]), *mark, f"{reading['score']:.3f}"] in [
            line[: 2 + len(mark)] for line in lines
        ]
    assert list(tmp_path.iterdir()) == []


def test_a_preset_is_read_in_the_place_of_its_layer(analyze: Cli) -> None:
    code, out, err = analyze("--quiet", "--preset", "semeval-7b")
    assert (code, err) == (0, "")
    assert "--method.layer auto:" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--output", "out"), "--output"),
        (("--method", "libu"), "--method libu: steers no layer"),
    ],
    ids=str,
)
def test_wrong_options_end_with_2_and_one_line(
    options: tuple[str, ...], words: str, analyze: Cli
) -> None:
    code, out, err = analyze(*options)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_the_command_knows_its_subcommands(run_cli: Cli) -> None:
    code, out, _ = run_cli("analyze", "--help")
    assert code == 0
    assert "layers" in out
    code, _, err = run_cli("analyze", "layer")
    assert code == 2
    assert "analyze layer: no such subcommand; write expunge analyze layers MODEL" in err
    code, out, _ = run_cli("analyze", "layers", "--help")
    assert code == 0
    for option in ("--seed", "--method.beta"):
        assert option in out
    for option in ("--overwrite", "--resume"):
        assert option not in out
