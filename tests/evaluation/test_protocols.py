"""`expunge evaluate --protocol tofu` and `compare` end to end on a tiny model that knows its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import read_jsonl, refusal, write_jsonl
from expunge.cli.evaluate import _recalled
from expunge.data import formats
from expunge.errors import RunError
from expunge.evaluation import generation
from expunge.evaluation.protocols.base import check_finite
from expunge.evaluation.protocols.inputs import ProtocolInputs
from expunge.evaluation.protocols.measuring import measure_by_protocol
from expunge.evaluation.protocols.tofu import MEASURES
from expunge.evaluation.score_files import read_protocol_scores, read_scores
from expunge.models.loading import check_model, load_model

Cli = Callable[..., tuple[int, str, str]]
Lines = list[dict[str, Any]]
SETS = ("forget", "retain", "real_authors", "world_facts")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 40)


def perturbed(rows: Lines) -> Lines:
    """The questions among the rows in TOFU's columns, with right answers in other words."""
    asked = [row for row in rows if row["id"].endswith("qa0")]
    return [
        {
            "question": row["input"],
            "answer": row["output"],
            "paraphrased_question": f"And the number, {row['input']}",
            "paraphrased_answer": f"It is {row['output']}",
            "perturbed_answer": [f"It is 1{n}-2{n}" for n in range(5)],
        }
        for row in asked
    ]


def general(rows: Lines) -> Lines:
    """The same without other words for the right answer, as TOFU's general sets are."""
    return [
        {
            "question": row["question"],
            "answer": row["answer"],
            "perturbed_answer": row["perturbed_answer"][:3],
            "original_answer": row["paraphrased_answer"],
        }
        for row in rows
    ]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tofu")
    kept = perturbed(retain_rows)
    rows = {
        "forget": perturbed(forget_rows),
        "retain": kept,
        "real_authors": general(kept[:2]),
        "world_facts": general(kept[2:]),
    }
    return {name: write_jsonl(directory / f"{name}.jsonl", rows[name]) for name in SETS}


@pytest.fixture(scope="module")
def options(files: Mapping[str, Path]) -> list[str]:
    named = [(f"--{name.replace('_', '-')}", str(path)) for name, path in files.items()]
    return ["--protocol", "tofu", "--quiet", *(word for pair in named for word in pair)]


def slow_loss(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """Mean loss of the answer's tokens and of the end of text, one token after the other."""
    start = len(tokenizer(question)["input_ids"])
    ids = [*tokenizer(f"{question} {answer}")["input_ids"], tokenizer.eos_token_id]
    losses = []
    with torch.no_grad():
        for place in range(start, len(ids)):
            logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
            losses.append(-float(logits.log_softmax(-1)[ids[place]]))
    return sum(losses) / len(losses)


def test_tofu_end_to_end(
    memorised_dir: Path,
    oracle_dir: Path,
    tokenizer: Any,
    files: dict[str, Path],
    options: list[str],
    run_cli: Cli,
    tmp_path: Path,
) -> None:
    scores, records, oracle = tmp_path / "s.json", tmp_path / "r.jsonl", tmp_path / "o.json"
    code, out, err = run_cli("evaluate", oracle_dir, *options, "--json", "--output", oracle)
    assert (code, err) == (0, "")
    more = ("--oracle-scores", oracle, "--output", scores, "--records", records)
    code, out, err = run_cli("evaluate", memorised_dir, *options, *more)
    assert (code, err) == (0, "")
    found = json.loads(scores.read_text())["scores"]
    assert list(found) == list(MEASURES)
    for name, measure in MEASURES.items():
        assert found[name] is not None
        told = next(line for line in out.splitlines() if line.strip().startswith(measure.title))
        assert told.split()[-1] == format(found[name], measure.form)
    assert found["forget_rouge"] == found["forget_exact_memorisation"] == 1
    assert found["forget_probability"] > 0.9
    assert found["retain_extraction_strength"] == 1
    assert 0 < found["model_utility"] < 1

    # By row against passes of one token after the other; the aggregates have tests of their own.
    model = load_model(check_model(str(memorised_dir)), "float32", "cpu")
    lines = read_jsonl(records)
    assert [line["id"] for line in lines if line["split"] == "world_facts"] == [
        "world_facts-1",
        "world_facts-2",
    ]
    for name in ("forget", "world_facts"):
        given = read_jsonl(files[name])
        mine = [line for line in lines if line["split"] == name]
        assert len(mine) == len(given)
        for row, line in zip(given, mine, strict=True):
            own, right, *wrong = (
                slow_loss(model, tokenizer, row["question"], text)
                for text in (
                    row["answer"],
                    row.get("paraphrased_answer", row["answer"]),
                    *row["perturbed_answer"],
                )
            )
            assert line["probability"] == pytest.approx(math.exp(-own), rel=1e-4)
            expected = sum(wrong) / len(wrong) - right
            assert line["log_truth_ratio"] == pytest.approx(expected, rel=1e-4)

    for path in (scores, records, oracle):
        for rows in map(read_jsonl, files.values()):
            assert not any(row["answer"] in path.read_text() for row in rows if len(row["answer"]) > 6)
    assert "generated" not in lines[0]

    # What was written is read: as an oracle, and by compare, which mixes no protocols.
    again = read_protocol_scores(str(scores), "tofu", MEASURES)
    assert dict(again.scores) == found
    assert set(again.rows["log_truth_ratio"]) == {f"forget-{n}" for n in range(1, 5)}
    code, out, err = run_cli("compare", scores, "--oracle", oracle, "--markdown")
    assert (code, err) == (0, "")
    assert (
        f"| model utility | 0-1 | high | {json.loads(oracle.read_text())['scores']['model_utility']:.3f}"
        in out
    )
    assert "was measured by the protocol tofu, not semeval" in refusal(lambda: read_scores(str(scores)))


def test_scores_do_not_depend_on_the_batch_and_are_their_own_best_oracle(
    memorised_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    output = str(tmp_path / "s.json")
    given = {name: str(path) for name, path in files.items()}

    def measured(**changed: Any) -> Any:
        inputs = {"model": str(memorised_dir), "protocol": "tofu", **given, **changed}
        return measure_by_protocol(ProtocolInputs(**inputs))

    first = measured(output=output)
    second = measured(batch_size=1, oracle_scores=output)
    assert first.scores["forget_quality"] is None
    assert second.scores["forget_quality"] == 1
    for name, value in first.scores.items():
        if value is not None:
            assert second.scores[name] == pytest.approx(value, rel=1e-5)


def inputs(memorised_dir: Path, **given: Any) -> Callable[[], Any]:
    values = {"model": str(memorised_dir), "protocol": "tofu", **given}
    return lambda: measure_by_protocol(ProtocolInputs(**values))


def test_each_file_is_read_once(
    memorised_dir: Path, files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    decoded = formats._decoded

    def counted(path: Path) -> str:
        read.append(path)
        return decoded(path)

    monkeypatch.setattr(formats, "_decoded", counted)
    inputs(memorised_dir, **{name: str(path) for name, path in files.items()})()
    assert sorted(read) == sorted(files.values())


def test_rows_without_wrong_answers_leave_their_scores_open(
    memorised_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    plain = [{name: row[name] for name in ("question", "answer")} for row in read_jsonl(files["forget"])]
    found = inputs(memorised_dir, forget=str(write_jsonl(tmp_path / "f.jsonl", plain)))()
    measured = {name for name, value in found.scores.items() if value is not None}
    assert measured == {
        f"forget_{part}"
        for part in ("probability", "rouge", "extraction_strength", "exact_memorisation")
    }
    assert found.rows == {"log_truth_ratio": {}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"perturbed_answer": None}, "line 2: column 'perturbed_answer' holds a null where wrong"),
        ({"perturbed_answer": "secret"}, "line 2: column 'perturbed_answer' holds a str where"),
        ({"perturbed_answer": [""]}, "line 2: column 'perturbed_answer' is empty"),
        ({"paraphrased_answer": None}, "line 2: column 'paraphrased_answer' holds a null"),
    ],
)
def test_a_row_with_other_columns_is_named(
    change: dict[str, Any], said: str, memorised_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    rows = read_jsonl(files["forget"])
    rows[1] |= change
    message = refusal(inputs(memorised_dir, forget=str(write_jsonl(tmp_path / "f.jsonl", rows))))
    assert said in message
    assert "secret" not in message


def test_an_oracle_of_other_rows_is_refused(
    memorised_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    few = str(write_jsonl(tmp_path / "f.jsonl", read_jsonl(files["forget"])[:2]))
    output = str(tmp_path / "o.json")
    inputs(memorised_dir, forget=few, output=output)()
    forget = str(files["forget"])
    message = refusal(inputs(memorised_dir, forget=forget, oracle_scores=output))
    assert "has the truth ratios of 2 forget rows, not of these 4" in message
    plain = [{"question": "Who?", "answer": "Ada"}]
    forget = str(write_jsonl(tmp_path / "p.jsonl", plain))
    message = refusal(inputs(memorised_dir, forget=forget, oracle_scores=output))
    assert "has no columns 'paraphrased_answer' and 'perturbed_answer'" in message


def test_options_of_another_protocol_are_refused() -> None:
    for protocol, name in (("tofu", "nonmembers"), ("tofu", "mmlu"), ("semeval", "world_facts")):
        values: dict[str, Any] = {"model": "m", "forget": "f", "protocol": protocol, name: "x"}
        message = refusal(partial(ProtocolInputs, **values))
        assert message.startswith(f"--{name.replace('_', '-')}: is of --protocol ")
        assert message.endswith(f"this is {protocol}; leave it out")


def test_a_run_directory_tells_only_what_the_protocol_takes(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("protocol: tofu\n")
    assert {"retain", "nonmembers", "mmlu"} <= set(_recalled(["out"]))
    for arguments in (["out", "--protocol", "tofu"], ["out", "--config", str(config)]):
        assert {"forget", "retain", "columns"} <= set(_recalled(arguments))
        assert not {"nonmembers", "mmlu"} & set(_recalled(arguments))
    assert not {"retain", "nonmembers", "mmlu"} & set(_recalled(["out", "--protocol=muse"]))


def test_a_loss_that_is_no_number_ends_the_measurement() -> None:
    check_finite({"a": 1.0})
    with pytest.raises(RunError, match=r"row 'b': .* \(2 such rows\)"):
        check_finite({"a": 1.0, "b": math.nan, "c": math.inf})
