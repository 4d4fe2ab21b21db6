"""`evaluate`, `compare` and `data inspect` end to end: what they print, write and keep to themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expunge.evaluation import generation
from expunge.evaluation.scorecard import Scorecard

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 40)


@pytest.fixture
def evaluate(
    memorised_dir: Path, row_files: dict[str, Path], quiz_dir: Path, run_cli: Cli
) -> Callable[..., tuple[int, str, str]]:
    def call(*options: object) -> tuple[int, str, str]:
        return run_cli(
            *("evaluate", memorised_dir, "--forget", row_files["forget"]),
            *("--retain", row_files["retain"], "--nonmembers", row_files["nonmembers"]),
            *("--mmlu", quiz_dir, *options),
        )

    return call


@pytest.fixture
def texts(forget_rows: list[dict[str, str]], retain_rows: list[dict[str, str]]) -> list[str]:
    """What no output may hold unless it was asked for: inputs, outputs and what tells them apart."""
    rows = forget_rows + retain_rows
    return [row[column] for row in rows for column in ("input", "output")] + ["river", "number of"]


def assert_silent_on(texts: list[str], *outputs: str) -> None:
    for output in outputs:
        assert [text for text in texts if text in output] == []


def table_rows(text: str) -> list[list[str]]:
    """The cells of every line: columns stand at least two spaces apart."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def test_evaluate_prints_a_table_with_range_and_direction(
    evaluate: Cli, memorised_dir: Path, texts: list[str]
) -> None:
    code, out, err = evaluate("--quiet")
    assert (code, err) == (0, "")
    assert f"Scorecard of {memorised_dir}" in " ".join(out.split())  # a long path is wrapped
    rows = table_rows(out)
    for name, value, good in (
        ("forget Task1 regurgitation", "1.000", "low"),
        ("retain Task2 knowledge", "1.000", "high"),
        ("task aggregate", "0.000", "high"),
        ("MIA AUC", "1.000", "0.5"),
    ):
        assert [name, "0-1", good, value] in rows
    assert "unchanged: the forget set still scores 1.00" in out
    # Of four documents beside three, chance gives such an AUC in 5.7%.
    assert "not forgotten by loss" not in out
    assert_silent_on(texts, out)


def test_progress_goes_to_standard_error_and_holds_no_text(evaluate: Cli, texts: list[str]) -> None:
    code, out, err = evaluate("--json")
    assert code == 0
    json.loads(out)
    assert "generate forget" in err
    assert_silent_on(texts, out, err)


def test_evaluate_gives_the_same_json_on_paper_and_on_screen(
    evaluate: Cli, memorised_dir: Path, texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "scores.json"
    code, out, err = evaluate("--json", "--quiet", "--output", path)
    assert (code, err) == (0, "")
    written = json.loads(path.read_text())
    assert written.pop("model") == memorised_dir.name
    assert list(written.pop("model_sha256")) == ["model.safetensors"]
    assert written == json.loads(out)
    assert written["forget"]["Task1"] == {"regurgitation": 1.0, "knowledge": 1.0}
    assert written["final_score"] == pytest.approx(written["utility"] / 3)
    assert_silent_on(texts, out, path.read_text())


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_name_rows_and_show_text_only_when_asked(
    evaluate: Cli, forget_rows: list[dict[str, str]], texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    assert evaluate("--quiet", "--records", path)[0] == 0
    masked = records(path)
    assert_silent_on(texts, path.read_text())
    assert [record["id"] for record in masked[:8]] == [row["id"] for row in forget_rows]
    measured = {"extraction_strength", "exact_memorisation", "score", "runs_on"}
    assert all(set(r) == {"id", "split", "task", "kind"} | measured for r in masked)
    code, out, _ = evaluate("--quiet", "--records", path, "--reveal")
    assert code == 0
    revealed = records(path)
    outputs = [row["output"] for row in forget_rows]
    assert [record.pop("generated").strip() for record in revealed][:8] == outputs
    assert revealed == masked
    assert_silent_on(texts, out)  # --reveal is for the records alone


def test_mapped_columns_score_as_the_rows_do(
    run_cli: Cli, memorised_dir: Path, forget_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    names = {"input": "q", "output": "a", "id": "nr", "task": "task"}
    renamed = [{names[name]: text for name, text in row.items()} for row in forget_rows]
    spare = [{**row, "note": "other words"} for row in forget_rows]
    paths = [tmp_path / f"{name}.jsonl" for name in ("plain", "renamed", "spare")]
    for path, rows in zip(paths, (forget_rows, renamed, spare), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("evaluate", memorised_dir, "--quiet", "--json", "--forget")
    code, plain, _ = run_cli(*command, paths[0])
    assert code == 0
    assert run_cli(*command, paths[1], "--columns", "prompt=q,output=a,id=nr") == (0, plain, "")
    code, _, err = run_cli(*command, paths[2])
    assert code == 2
    assert "columns 'note' look like text" in err
    mend = re.search(r"--columns (\S+)", err)
    assert mend is not None
    assert run_cli(*command, paths[2], "--columns", mend[1]) == (0, plain, "")
    # Another joiner is another text.
    changed = run_cli(*command, paths[0], "--joiner", "")
    assert (changed[0], changed[2]) == (0, "")


def test_what_is_not_measured_is_a_dash_and_null(
    run_cli: Cli, memorised_dir: Path, row_files: dict[str, Path]
) -> None:
    command = ("evaluate", memorised_dir, "--forget", row_files["forget"], "--quiet")
    _, out, _ = run_cli(*command)
    for name in ("task aggregate", "MIA AUC", "MIA score", "utility", "final score"):
        assert re.search(rf"^ {name}( \(guessing: 0.25\))? .* - *$", out, re.MULTILINE)
    values = json.loads(run_cli(*command, "--json")[1])
    for name in ("task_aggregate", "mia_auc", "mia_score", "utility", "final_score"):
        assert values[name] is None


def test_a_yaml_file_gives_options_and_flags_override_it(
    run_cli: Cli, memorised_dir: Path, row_files: dict[str, Path], tmp_path: Path
) -> None:
    config = tmp_path / "evaluate.yaml"
    fields = {"model": str(memorised_dir), "forget": str(row_files["retain"]), "json": True}
    config.write_text(json.dumps(fields))  # JSON is YAML
    code, out, _ = run_cli("evaluate", "--config", config, "--quiet")
    assert (code, json.loads(out)["details"]["rows"]) == (0, {"forget": 8, "retain": 0})
    other = ("--forget", row_files["nonmembers"])
    code, out, _ = run_cli("evaluate", "--config", config, "--quiet", *other)
    assert (code, json.loads(out)["details"]["rows"]["forget"]) == (0, 3)


def card(forget: float, retain: float, utility: float | None = 0.5) -> Scorecard:
    return Scorecard(
        forget={"Task1": {"regurgitation": forget, "knowledge": None}},
        retain={"Task1": {"regurgitation": retain, "knowledge": None}},
        task_aggregate=retain,
        mia_auc=0.5,
        mia_score=1.0,
        utility=utility,
        final_score=None if utility is None else (retain + 1 + utility) / 3,
    )


CARDS = {
    "target": card(0.9, 0.8),
    "oracle": card(0.1, 0.8),
    "good": card(0.1, 0.7, utility=None),
    "ruined": card(0.0, 0.1),
}


@pytest.fixture
def scores(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, value in CARDS.items():
        found[name] = tmp_path / name
        found[name].mkdir()
        (found[name] / "scores.json").write_text(json.dumps({"model": name, **value.to_json()}))
    return found


def test_compare_puts_runs_beside_target_and_oracle(run_cli: Cli, scores: dict[str, Path]) -> None:
    code, out, err = run_cli(
        *("compare", scores["good"], scores["ruined"] / "scores.json"),
        *("--target", scores["target"], "--oracle", scores["oracle"]),
    )
    assert (code, err) == (0, "")
    rows = table_rows(out)
    assert ["measure", "range", "good", *("target", "oracle", "good", "ruined")] in rows
    cells = ["0.900", "0.100", "0.100", "0.000"]
    assert ["forget Task1 regurgitation", "0-1", "low", *cells] in rows
    assert ["utility (guessing: 0.25)", "0-1", "high", "0.500", "0.500", "-", "0.500"] in rows
    assert not any(row[:1] == ["forget Task1 knowledge"] for row in rows)  # nobody measured it
    assert "ruined: destroyed: 0.10 is left on the retain set, the target has 0.80" in out
    assert not re.search("^(target|oracle|good): ", out, re.MULTILINE)


def test_compare_in_markdown_is_one_table(run_cli: Cli, scores: dict[str, Path]) -> None:
    code, out, _ = run_cli("compare", scores["good"], "--target", scores["target"], "--markdown")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [
        "| measure | range | good | target | good |",
        "| --- | --- | --- | --- | --- |",
    ]
    assert "| final score | 0-1 | high | 0.767 | - |" in lines
    assert {line.count("|") for line in lines} == {6}


def test_compare_in_json_gives_every_card_under_a_name_of_its_own(
    run_cli: Cli, scores: dict[str, Path]
) -> None:
    code, out, _ = run_cli("compare", scores["good"], scores["ruined"], scores["good"], "--json")
    assert code == 0
    expected = {name: CARDS[name.split()[0]].to_json() for name in ("good", "ruined", "good (2)")}
    assert json.loads(out) == expected


@pytest.fixture
def inspect(memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli) -> Cli:
    def call(*options: object) -> tuple[int, str, str]:
        return run_cli("data", "inspect", row_files["forget"], "--model", memorised_dir, *options)

    return call


def test_inspect_counts_rows_and_tokens(
    inspect: Cli, tokenizer: Any, forget_rows: list[dict[str, str]], texts: list[str]
) -> None:
    code, out, err = inspect()
    assert (code, err) == (0, "")
    lengths = [len(tokenizer(f"{r['input']} {r['output']}")["input_ids"]) for r in forget_rows]
    assert "8 rows, 8 sequences" in out
    assert "Task1 qa: 2" in out
    assert "read from: input, output (8)" in out
    assert "kind told by: the id (8)" in out
    assert "document told by: the id (8)" in out
    assert "joined by: ' ' (8)" in out
    assert f"tokens: {sum(lengths)} (" in out
    assert f"longest {max(lengths)}" in out
    assert "context 128, BOS none, EOS appended to retained rows only, chat template off" in out
    assert_silent_on(texts, out)


def test_inspect_shows_a_row_masked(
    inspect: Cli, tokenizer: Any, forget_rows: list[dict[str, str]], texts: list[str]
) -> None:
    row = forget_rows[0]
    text = f"{row['input']} {row['output']}"
    ids = tokenizer(text)["input_ids"]
    _, table, _ = inspect("--row", row["id"])
    _, raw, _ = inspect("--row", row["id"], "--json")
    assert row["id"] in table
    words = [word for word in text.split() if len(word) > 3]
    assert_silent_on([*texts, *words], table, raw)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]
    rows = [cells for cells in rows if cells]
    assert len(rows) == len(ids)
    for position, (window, place, part, label, token_id, token) in enumerate(rows):
        assert (window, place, token_id, token) == ("0", str(position), "•••", "•••")
        assert (part, label) in {("prompt", "-100"), ("answer", "•••")}
    shown = json.loads(raw)["row"]["tokens"]
    assert len(shown) == len(ids)
    assert {token["id"] for token in shown} == {token["token"] for token in shown} == {"•••"}
    assert {token["label"] for token in shown} == {"•••", -100}


def test_inspect_reveals_a_row_when_asked(
    inspect: Cli, tokenizer: Any, forget_rows: list[dict[str, str]]
) -> None:
    row = forget_rows[0]
    ids = tokenizer(f"{row['input']} {row['output']}")["input_ids"]
    _, raw, _ = inspect("--row", row["id"], "--json", "--reveal")
    shown = json.loads(raw)["row"]["tokens"]
    assert [token["id"] for token in shown] == ids
    answer = [token for token in shown if token["part"] == "answer"]
    assert "".join(token["token"] for token in answer) == " " + row["output"]
    assert [token["label"] for token in answer] == [token["id"] for token in answer]
    prompt = [token for token in shown if token["part"] == "prompt"]
    assert "".join(token["token"] for token in prompt) == row["input"]
    assert {token["label"] for token in prompt} == {-100}
    _, table, _ = inspect("--row", row["id"], "--reveal")
    assert "' Paris'" in table


def test_inspect_ends_retained_rows_with_eos_and_windows_long_ones(
    run_cli: Cli, memorised_dir: Path, row_files: dict[str, Path], tmp_path: Path, tokenizer: Any
) -> None:
    command = ("data", "inspect", "--model", memorised_dir, "--json", "--row", "long", "--reveal")
    path = tmp_path / "retain.jsonl"
    path.write_text(json.dumps({"id": "long", "input": "a " * 140, "output": "b"}))
    options = ("--rows", path, "--role", "retain", "--long-rows", "window")
    code, out, _ = run_cli(*command, *options)
    assert code == 0
    report = json.loads(out)
    assert (report["rows"], report["sequences"]) == (1, 2)
    tokens = report["row"]["tokens"]
    assert {token["window"] for token in tokens} == {0, 1}
    assert tokens[-1]["id"] == tokens[-1]["label"] == tokenizer.eos_token_id
    overlap = [token for token in tokens if token["part"] == "not counted"]
    assert len(overlap) == 128 // 4
