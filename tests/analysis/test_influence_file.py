"""influence.json: thresholds, weights, what is written, read and refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import refusal
from expunge.analysis.influence_file import (
    FORMAT,
    ForgetRow,
    Influence,
    RetainRow,
    RowsAtRisk,
    check_same_rows,
    influence_text,
    is_gone,
    read_influence,
    sampling_weights,
    thresholds_of,
)
from expunge.analysis.overlap import Overlap
from expunge.analysis.row_gradients import Known
from expunge.data.rows import as_rows


def known(answer_loss: float, recall: float) -> Known:
    return Known(5, 1.0, answer_loss, recall)


def test_thresholds_are_medians_of_never_seen_rows_where_there_are_enough() -> None:
    rows = [("sc", known(float(n), n / 20)) for n in range(11)] + [("qa", known(9.0, 0.0))] * 9
    found = thresholds_of(rows, vocabulary=50)
    assert (found["sc"].answer_loss, found["sc"].recall) == (5.0, 0.25)
    assert found["sc"].source == "medians of 11 non-members"
    assert (found["qa"].answer_loss, found["qa"].recall) == (math.log(50), 0.0)
    assert "guessing" in found["qa"].source


def test_a_row_is_gone_only_where_loss_and_recall_say_so() -> None:
    limit = thresholds_of([], vocabulary=10)["sc"]
    assert is_gone(known(3.0, 0.0), limit)
    assert not is_gone(known(2.0, 0.0), limit)
    assert not is_gone(known(3.0, 0.1), limit)


@given(
    # Times a unit, anything nearer to 0 is 0 or loses its digits.
    st.lists(st.floats(-5, 5).filter(lambda v: v == 0 or abs(v) > 1e-300), min_size=1, max_size=40),
    st.floats(1.5, 10),
    st.floats(1e-3, 1e3),
)
def test_weights_lie_between_once_and_the_factor_and_no_unit_changes_them(
    values: list[float], factor: float, unit: float
) -> None:
    collateral = {str(n): value for n, value in enumerate(values)}
    weights = sampling_weights(collateral, factor)
    assert all(1 <= weight <= factor * (1 + 1e-12) for weight in weights.values())
    for row, value in collateral.items():
        assert value > 0 or weights[row] == 1
        for other, second in collateral.items():
            assert value > second or weights[row] <= weights[other]
    if max(values) > 0:
        assert max(weights.values()) == pytest.approx(factor)
    scaled = sampling_weights({row: unit * value for row, value in collateral.items()}, factor)
    assert scaled == pytest.approx(weights)


def test_one_extreme_row_does_not_decide() -> None:
    collateral = {str(n): 1.0 for n in range(20)} | {"extreme": 1e6}
    assert set(sampling_weights(collateral, 3.0).values()) == {3.0}


def influence(**changes: Any) -> Influence:
    values: dict[str, Any] = {
        "model": "m",
        "model_sha256": {"model.safetensors": "ab"},
        "data_hmac_sha256": {"forget": "01:cd"},
        "settings": {"curvature": "diagonal"},
        "curvature": {"damping": 1.0},
        "thresholds": thresholds_of([], 10),
        "forget": [ForgetRow("a", "t", "sc", 3, 0.1, 0.2, 1.0, 0.5, gone=True)],
        "retain": [RetainRow("b", "t", "qa", 3, 0.1, 0.2, 1.0, -0.25)],
        "overlaps": [Overlap("b", "same subject", ("a",), 1, subjects=("jane secret",))],
        "expunge": "0",
    }
    return Influence(**(values | changes))


def test_what_is_written_is_read_and_holds_no_text(tmp_path: Path) -> None:
    path = tmp_path / "influence.json"
    path.write_text(influence_text(influence()))
    found = read_influence(path)
    assert found.collateral == {"b": -0.25}
    assert found.gone == {"a"}
    assert found.model_sha256 == {"model.safetensors": "ab"}
    assert "secret" not in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["influence.json"]


def test_files_that_are_no_influence_json_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert "cannot be read" in refusal(lambda: read_influence(path))
    for text in ("{", "[]", "3", '{"format": 3}', json.dumps({"format": FORMAT})):
        path.write_text(text)
        message = refusal(lambda: read_influence(path))
        assert message.startswith(f"--influence {path}: is not")
        assert message.endswith("write one with expunge analyze influence")
    huge = influence().to_json()
    huge["retain"][0]["collateral"] = 10**400  # beyond every float
    for text in (json.dumps(huge), "[" * 100_000, f'{{"format": {"9" * 6000}}}'):
        path.write_text(text)
        assert "is not an influence.json" in refusal(lambda: read_influence(path))
    plain = influence().to_json()
    plain["retain"][0]["collateral"] = math.inf
    path.write_text(json.dumps(plain))
    assert "not finite" in refusal(lambda: read_influence(path))


def test_other_rows_are_refused_by_id() -> None:
    rows = RowsAtRisk({"b": 1.0}, frozenset({"a"}), {}, "")
    forget = as_rows([{"id": "a", "input": "x", "output": "y"}], "forget")
    retain = as_rows([{"id": "b", "input": "x", "output": "z"}], "retain")
    check_same_rows("f.json", rows, forget, retain)
    message = refusal(lambda: check_same_rows("f.json", rows, forget, forget))
    assert "no entry for 1 of the retain rows, first 'a'" in message
    message = refusal(lambda: check_same_rows("f.json", rows, retain, retain))
    assert "marks 1 rows as gone that are not in the forget set, first 'a'" in message
