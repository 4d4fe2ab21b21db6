"""`expunge analyze layers`: what it prints, what a sweep says beside it, what it refuses."""

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


def sweep_file(path: Path, layers: dict[int, float]) -> Path:
    """What a sweep over these layers leaves, as far as it is read, with a trial that failed."""
    trials: list[dict[str, object]] = [
        {"state": "complete", "params": {"method.layer": layer}, "values": {"final": value}}
        for layer, value in layers.items()
    ]
    trials.append({"state": "failed", "params": {"method.layer": 1}, "values": None})
    path.write_text(json.dumps({"objectives": ["final"], "trials": trials}))
    return path


def test_measured_scores_stand_beside_the_prediction(analyze: Cli, tmp_path: Path) -> None:
    readings = json.loads(analyze("--quiet", "--json")[1])["readings"]
    order = sorted(readings, key=lambda reading: reading["score"])
    rising = {reading["layer"]: 0.25 * place for place, reading in enumerate(order, 1)}
    sweep = sweep_file(tmp_path / "sweep.json", rising)
    code, out, err = analyze("--measured", sweep, "--quiet")
    assert (code, err) == (0, "")
    assert "measured, final" in out
    assert "rank correlation of predicted and measured scores: 1.00" in out
    falling = {layer: 1 - value for layer, value in rising.items()}
    sweep_file(sweep, falling)
    found = json.loads(analyze("--measured", tmp_path, "--quiet", "--json")[1])
    assert found["rank_correlation"] == pytest.approx(-1)
    assert found["measured"] == {
        "objective": "final", "layers": {str(layer): value for layer, value in falling.items()},
    }  # fmt: skip


def test_a_sweep_over_layers_is_what_is_measured(
    analyze: Cli, memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    out_dir = tmp_path / "out"
    code, _, err = run_cli(
        *("sweep", memorised_dir, "--device", "cpu", "--output", out_dir, "--quiet"),
        *("--forget", row_files["forget"], "--retain", row_files["retain"]),
        *("--method", "adaptive-rmu", "--sampler", "grid", "--search", "method.layer=int:2:3"),
        *("--objectives", "retention", "--epochs", 2, "--learning-rate", 1e-3),
    )
    assert code == 0, err
    trials = json.loads((out_dir / "sweep.json").read_text())["trials"]
    found = json.loads(analyze("--measured", out_dir, "--quiet", "--json")[1])["measured"]
    assert found["objective"] == "retention"
    assert found["layers"] == {
        str(trial["params"]["method.layer"]): trial["values"]["retention"] for trial in trials
    }


def test_a_preset_is_read_in_the_place_of_its_layer(analyze: Cli) -> None:
    code, out, err = analyze("--predict-only", "--quiet", "--preset", "semeval-7b")
    assert (code, err) == (0, "")
    assert "--method.layer auto:" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--output", "out"), "--output: analyze layers runs and writes nothing"),
        (("--every=2",), "expunge sweep --sampler grid"),
        (("--method", "libu"), "--method libu: steers no layer"),
        (("--measured", "nowhere"), "--measured nowhere: not found"),
        (("--measured", "{broken}"), "is not what a sweep wrote"),
        (("--measured", "{other}"), "has no complete trial over method.layer"),
    ],
    ids=str,
)
def test_wrong_options_end_with_2_and_one_line(
    options: tuple[str, ...], words: str, analyze: Cli, tmp_path: Path
) -> None:
    broken, other = tmp_path / "broken.json", sweep_file(tmp_path / "other.json", {})
    broken.write_text('{"objectives": []}')
    code, out, err = analyze(*(option.format(broken=broken, other=other) for option in options))
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
    for option in ("--measured", "--method.beta"):
        assert option in out
    for option in ("--overwrite", "--resume"):
        assert option not in out
