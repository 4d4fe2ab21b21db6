"""Runs that take retain rows at risk more often and leave out forget rows that are gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import refusal
from expunge.analysis.influence import InfluenceInputs, analyze_influence
from expunge.methods.gradient_difference import GradientDifference
from expunge.runs.run import RunInputs, run
from expunge.training.options import TrainingOptions
from expunge.training.preparation import Prepared, prepare


@pytest.fixture
def influence_file(
    memorised_dir: Path, row_files: dict[str, Path], tmp_path: Path
) -> Callable[..., Path]:
    """An influence.json of the tiny target; what is given as gone is marked so."""

    def write(gone: tuple[str, ...] = ()) -> Path:
        path = tmp_path / "influence.json"
        analyze_influence(
            InfluenceInputs(
                model=str(memorised_dir),
                forget=str(row_files["forget"]),
                retain=str(row_files["retain"]),
                output=str(path),
                device="cpu",
            )
        )
        values = json.loads(path.read_text())
        for row in values["forget"]:
            row["gone"] = row["id"] in gone
        # So far apart that their order shows; the tiny model's own values are nearly 0.
        for number, row in enumerate(values["retain"]):
            row["collateral"] = float(number - 2)
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.fixture
def prepared(memorised_dir: Path, row_files: dict[str, Path], tokenizer: Any) -> Callable[..., Prepared]:
    from expunge.data.rows import read_rows
    from expunge.models.loading import check_model

    checked = check_model(str(memorised_dir))
    forget = read_rows(str(row_files["forget"]), "forget")
    retain = read_rows(str(row_files["retain"]), "retain")

    def call(*, with_retain: bool = True, **options: Any) -> Prepared:
        return prepare(
            GradientDifference(),
            TrainingOptions(validation_fraction=0.0, **options),
            checked.config,
            checked.layout,
            checked.tokenizer,
            forget,
            retain if with_retain else None,
            None,
        )

    return call


def test_retain_rows_at_risk_are_weighted_and_random_ones_keep_their_share(
    prepared: Callable[..., Prepared], influence_file: Callable[..., Path]
) -> None:
    plain = prepared()
    assert {example.weight for example in (*plain.forget, *plain.retain)} == {1.0}
    assert plain.describe()["influence"] is None
    found = prepared(influence=str(influence_file()), retain_sampling="influence", risk_factor=4.0)
    weights = {example.row_id: example.weight for example in found.retain if example.listed}
    ordered = list(weights.values())
    assert ordered[:3] == [1.0, 1.0, 1.0]  # their loss falls or stays
    assert ordered == sorted(ordered)
    assert ordered[-1] == 4.0
    mean = sum(ordered) / len(ordered)
    assert {e.weight for e in found.retain if not e.listed} <= {mean}
    assert {example.weight for example in found.forget} == {1.0}
    described = found.describe()
    assert described["influence"]["mean_retain_weight"] == pytest.approx(mean)
    assert described["influence"]["forget_rows_skipped"] == 0
    assert (described["retain_sampling"], described["risk_factor"]) == ("influence", 4.0)
    assert found.warnings == plain.warnings


def test_gone_rows_are_measured_and_not_trained_on(
    prepared: Callable[..., Prepared],
    influence_file: Callable[..., Path],
    forget_rows: list[dict[str, str]],
) -> None:
    gone = (forget_rows[1]["id"], forget_rows[4]["id"])
    found = prepared(influence=str(influence_file(gone)), skip_gone=True, batch_size=2)
    assert {e.row_id for e in found.forget} == {row["id"] for row in forget_rows} - set(gone)
    assert {e.row_id for e in found.validation.forget} >= set(gone)
    assert found.used.steps_per_epoch == 3
    assert found.describe()["influence"]["forget_rows_skipped"] == 2
    assert any("2 forget rows are gone already" in warning for warning in found.warnings)
    kept = prepared(influence=str(influence_file(gone)), retain_sampling="influence")
    assert len(kept.forget) == len(forget_rows)


def test_nothing_left_to_unlearn_is_refused(
    prepared: Callable[..., Prepared],
    influence_file: Callable[..., Path],
    forget_rows: list[dict[str, str]],
) -> None:
    path = str(influence_file(tuple(row["id"] for row in forget_rows)))
    message = refusal(lambda: prepared(influence=path, skip_gone=True))
    assert "--skip-gone: all 8 forget rows are gone already" in message


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"retain_sampling": "influence"}, "--retain-sampling influence: needs --influence FILE"),
        ({"skip_gone": True}, "--skip-gone: needs --influence FILE"),
        ({"influence": "x.json"}, "--influence x.json: nothing uses it"),
        ({"risk_factor": 1.0}, "--risk-factor 1.0: must be over 1"),
        ({"risk_factor": 11.0}, "at most 10"),
    ],
)
def test_options_that_need_each_other_say_so(options: dict[str, Any], part: str) -> None:
    assert part in refusal(lambda: TrainingOptions(**options))


def test_influence_sampling_needs_a_retain_set(
    prepared: Callable[..., Prepared], influence_file: Callable[..., Path]
) -> None:
    from expunge.errors import InputError

    with pytest.raises(InputError, match="retain set"):
        prepared(with_retain=False, influence=str(influence_file()), retain_sampling="influence")


def inputs_of(memorised_dir: Path, row_files: dict[str, Path], output: Path) -> RunInputs:
    return RunInputs(
        model=str(memorised_dir),
        forget=str(row_files["forget"]),
        retain=str(row_files["retain"]),
        output=str(output),
        device="cpu",
    )


def test_a_run_says_what_it_took_and_twice_gives_the_same_bytes(
    memorised_dir: Path,
    row_files: dict[str, Path],
    influence_file: Callable[..., Path],
    forget_rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    path = influence_file((forget_rows[1]["id"],))
    options = TrainingOptions(
        epochs=2,
        batch_size=3,
        learning_rate=1e-4,
        select="last",
        influence=str(path),
        retain_sampling="influence",
        skip_gone=True,
    )
    weights = []
    for name in ("one", "two"):
        inputs = inputs_of(memorised_dir, row_files, tmp_path / name)
        manifest = run(inputs, GradientDifference(), options)
        used = manifest["settings"]["training"]["influence"]
        assert used["forget_rows_skipped"] == 1
        assert used["mean_retain_weight"] > 1
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        written = (tmp_path / name / "expunge.json").read_text()
        assert not [row["output"] for row in forget_rows if row["output"] in written]
    assert weights[0] == weights[1]


def test_an_influence_json_of_another_model_is_refused_before_anything_is_written(
    memorised_dir: Path,
    row_files: dict[str, Path],
    influence_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = influence_file()
    values = json.loads(path.read_text())
    values["model_sha256"]["model.safetensors"] = "0" * 64
    path.write_text(json.dumps(values))
    options = TrainingOptions(influence=str(path), retain_sampling="influence")
    inputs = inputs_of(memorised_dir, row_files, tmp_path / "out")
    message = refusal(lambda: run(inputs, GradientDifference(), options))
    assert "is about another model" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["influence.json"]
