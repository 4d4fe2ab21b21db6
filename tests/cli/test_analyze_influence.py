"""`expunge analyze influence` end to end: tables, files, what it keeps to itself and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import write_jsonl

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")


@pytest.fixture
def analyze(memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli) -> Cli:
    def call(*options: object) -> tuple[int, str, str]:
        return run_cli(
            *("analyze", "influence", memorised_dir, "--forget", row_files["forget"]),
            *("--retain", row_files["retain"], "--device", "cpu", *options),
        )

    return call


@pytest.fixture
def texts(forget_rows: list[dict[str, str]], retain_rows: list[dict[str, str]]) -> list[str]:
    rows = forget_rows + retain_rows
    return [row[key] for row in rows for key in ("input", "output")] + ["river", "number of"]


def silent(texts: list[str], *outputs: str) -> bool:
    return not [text for text in texts for output in outputs if text in output]


def test_it_prints_tables_and_writes_ids_and_numbers(
    analyze: Cli, texts: list[str], forget_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "influence.json"
    code, out, err = analyze("--output", path, "--top", 3)
    assert code == 0
    assert "Forget rows, strongest 3" in out
    assert "Retain rows, most at risk 3" in out
    assert "8 forget rows, 0 of them gone already; 8 retain rows" in out
    assert silent(texts, out, err, path.read_text())
    values = json.loads(path.read_text())
    assert [row["id"] for row in values["forget"]] == [row["id"] for row in forget_rows]
    assert all(row["self_influence"] > 0 for row in values["forget"])
    assert all(row["recall"] == 1.0 and row["loss"] < 0.5 for row in values["forget"])
    assert len(values["retain"]) == 8
    assert {path.name} == {entry.name for entry in tmp_path.iterdir()}


def test_the_same_twice_gives_the_same_bytes_whatever_the_batch_size(
    analyze: Cli, tmp_path: Path
) -> None:
    files = [tmp_path / f"{n}" for n in range(2)]
    assert analyze("--quiet", "--output", files[0])[0] == 0
    assert analyze("--quiet", "--output", files[1])[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    code, out, err = analyze("--quiet", "--json", "--batch-size", 3)
    assert (code, err) == (0, "")
    alone, together = json.loads(out), json.loads(files[0].read_text())
    for one, other in zip(alone["forget"], together["forget"], strict=True):
        assert one["self_influence"] == pytest.approx(other["self_influence"], rel=1e-3)


@pytest.mark.slow
def test_layers_curvature_and_damping_change_what_is_predicted(analyze: Cli) -> None:
    def numbers(*options: object) -> tuple[int, list[float]]:
        code, out, _ = analyze("--quiet", "--json", *options)
        assert code == 0
        values = json.loads(out)
        return values["curvature"]["maps"], [row["self_influence"] for row in values["forget"]]

    maps, base = numbers()
    assert maps == 4 * 7
    few, upper = numbers("--layers", "2-3")
    assert few == 2 * 7
    others = [
        upper,
        numbers("--damping", 10)[1],
        numbers("--damping", 10, "--damping-unit", "absolute")[1],
        numbers("--curvature", "ekfac")[1],
    ]
    assert len({tuple(values) for values in [base, *others]}) == 5


def test_conjugate_gradients_say_how_far_they_came(
    analyze: Cli, texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "influence.json"
    code, out, err = analyze("--curvature", "cg", "--layers", "2-3", "--output", path)
    assert code == 0
    assert silent(texts, out, err, path.read_text())
    values = json.loads(path.read_text())
    residuals = values["curvature"]["residuals"]
    assert residuals[0] == 1.0
    assert residuals[-1] <= 0.1
    assert f"conjugate gradients: {len(residuals) - 1} iterations" in err
    assert len(values["retain"]) == 8
    code, _, err = analyze("--curvature", "cg", "--dtype", "bfloat16", "--output", tmp_path / "x")
    assert code == 2
    assert "--curvature cg: its products are too rough in bfloat16; give --dtype float32" in err
    assert not (tmp_path / "x").exists()


def test_never_seen_rows_set_the_threshold_and_a_model_that_never_learned_has_all_gone(
    run_cli: Cli, model_dir: Callable[[str], Path], row_files: dict[str, Path], tmp_path: Path
) -> None:
    never = [
        {"id": f"n{n}sc1", "input": f"Zed {n} was born in a house of", "output": f"Rome {n}."}
        for n in range(12)
    ]
    options = ("--nonmembers", write_jsonl(tmp_path / "never.jsonl", never), "--json", "--quiet")
    command = ("analyze", "influence", model_dir("olmo"), "--forget", row_files["forget"])
    code, out, _ = run_cli(*command, "--device", "cpu", *options)
    assert code == 0
    values = json.loads(out)
    assert values["thresholds"]["sc"]["source"] == "medians of 12 non-members"
    limits = values["thresholds"]
    assert {row["kind"] for row in values["forget"]} == {"sc", "qa"}
    for row in values["forget"]:
        limit = limits[row["kind"]]
        expected = row["answer_loss"] >= limit["answer_loss"] and row["recall"] <= limit["recall"]
        assert row["gone"] == expected
    assert any(row["gone"] for row in values["forget"])
    assert values["retain"] == []


def test_overlaps_are_listed_by_id_and_shown_when_asked(
    analyze: Cli,
    run_cli: Cli,
    memorised_dir: Path,
    row_files: dict[str, Path],
    retain_rows: list[dict[str, str]],
    forget_rows: list[dict[str, str]],
    texts: list[str],
    tmp_path: Path,
) -> None:
    near = dict(forget_rows[0], id="near-1", output=forget_rows[0]["output"] + " Indeed.")
    retain = write_jsonl(tmp_path / "retain.jsonl", [*retain_rows, near])
    command = ("analyze", "influence", memorised_dir, "--forget", row_files["forget"])
    code, out, _ = run_cli(*command, "--retain", retain, "--device", "cpu", "--quiet")
    assert code == 0
    assert "near repeat" in out
    assert "near-1" in out
    assert silent(texts, out)
    code, out, _ = run_cli(*command, "--retain", retain, "--device", "cpu", "--quiet", "--reveal")
    assert code == 0
    assert forget_rows[0]["output"] in out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--layers", "2-9"), ("--layers 2-9", "layers 0 to 3")),
        (("--layers", "3-1"), ("--layers 3-1",)),
        (("--layers", "last"), ("--layers last", "8-15")),
        (("--damping", "0"), ("--damping 0.0", "positive")),
        (("--batch-size", "0"), ("--batch-size 0",)),
        (("--top", "0"), ("--top 0",)),
        (("--dtype", "float16"), ("'float16'", "bfloat16")),
        (("--reveal", "--json"), ("--reveal", "--json")),
        (("--output", "nowhere/x.json"), ("--output nowhere/x.json", "make it first")),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    analyze: Cli, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    code, out, err = analyze(*options)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_an_unknown_analysis_is_named(run_cli: Cli) -> None:
    code, _, err = run_cli("analyze", "colours")
    assert code == 2
    assert "influence" in err
    assert run_cli("analyze")[0] == 2
    code, out, _ = run_cli("analyze", "--help")
    assert code == 0
    assert "influence" in out
