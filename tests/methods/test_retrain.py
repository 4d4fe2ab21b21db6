"""Retraining against plain loops, what it refuses, and a base as the yardstick of other methods."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import expunge
from conftest import make_rows, mostly_slow, refusal, tiny_model, write_jsonl
from expunge.data.batches import PAD_ID, collate
from expunge.data.rows import as_rows
from expunge.data.tokenization import TextPolicy, encode_rows
from expunge.maths.calibration import POINTS, NeverSeen, RowTokens, as_before
from expunge.methods.npo import NPO
from expunge.methods.retrain import Retrain
from expunge.models.loading import check_base, check_model
from expunge.training.validation import ValidationSet, asked_before, measure

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(model_dir: Callable[..., Path]) -> Path:
    """What `memorised_dir` was trained from."""
    return model_dir("olmo")


@pytest.fixture
def retrain(memorised_dir: Path, base: Path, row_files: dict[str, Path], run_cli: Cli) -> Cli:
    def call(output: Path, *options: object) -> tuple[int, str, str]:
        return run_cli(
            *("run", memorised_dir, "--method", "retrain", "--base", base, "--output", output),
            *("--forget", row_files["forget"], "--retain", row_files["retain"]),
            *("--epochs", 2, "--batch-size", 8, "--learning-rate", 1e-2, "--quiet"),
            *options,
        )

    return call


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "expunge.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_the_loss_is_the_mean_over_tokens_and_nothing_else_is_asked(
    parameters: Any, make_context: Callable[..., Any]
) -> None:
    context = make_context()
    examples = context.retain[:3]
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = context.model(input_ids=torch.tensor(example.input_ids)[None]).logits[0]
        for place in range(1, len(example)):
            if example.token_mask[place]:
                total -= float(logits[place - 1].log_softmax(-1)[example.input_ids[place]])
                count += 1
    objective = Retrain(parameters=parameters).start(context)
    terms = objective.loss(collate(examples, range(3), PAD_ID), None)
    assert float(terms.total.detach()) == pytest.approx(total / count, rel=1e-5)  # float32 sums
    assert objective.optimizer.options["betas"] == (0.9, 0.95)


def test_the_recipe_is_a_plain_loop_from_the_base(
    retrain: Cli, base: Path, tmp_path: Path, tokenizer: Any, retain_rows: list[dict[str, str]]
) -> None:
    """Every step takes all rows, so that their order does not matter."""
    out = tmp_path / "out"
    options = ("--method.parameters", "full", "--method.weight-decay", 0.1, "--epochs", 3)
    assert retrain(out, *options) == (0, "", "")
    model = tiny_model("olmo", len(tokenizer))
    rows = encode_rows(as_rows(retain_rows, "retain"), tokenizer, TextPolicy(128), eos=True)
    batch = collate(rows, range(len(rows)), PAD_ID)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(3):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        labels = torch.where(batch.token_mask, batch.input_ids, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.step()
        optimizer.zero_grad()
    written = load_file(out / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in written:
            # Adam divides by the gradient's size: rounding shows where that is small.
            torch.testing.assert_close(written[name], parameter.detach(), rtol=1e-3, atol=1e-4)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["retain"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert {line["forget"] for line in lines} == {0.0}
    record = manifest(out)
    assert record["base"]["model"] == base.name
    assert not record["base"]["sha256"].items() <= record["model_sha256"].items()
    assert record["settings"]["training"]["yardstick"] is None
    assert record["selection"]["chosen_step"] == record["steps"] == 3
    assert record["selection"]["judgement"] is None
    changed = {each["name"] for each in record["changed_tensors"]}
    assert changed == set(written)


def test_an_oracle_is_the_same_training_and_sees_no_forget_row(
    retrain: Cli, base: Path, row_files: dict[str, Path], tmp_path: Path, run_cli: Cli
) -> None:
    assert retrain(tmp_path / "out") == (0, "", "")
    recipe = ("--epochs", 2, "--batch-size", 8, "--learning-rate", 1e-2, "--quiet")
    oracle = ("oracle", base, "--retain", row_files["retain"], *recipe)
    assert run_cli(*oracle, "--output", tmp_path / "oracle") == (0, "", "")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("out", "oracle"))
    assert ours.read_bytes() == theirs.read_bytes()
    record = manifest(tmp_path / "oracle")
    assert set(record["rows"]) == {"retain"}
    assert record["base"]["sha256"].items() <= record["model_sha256"].items()
    again = ("--forget", row_files["retain"], "--output", tmp_path / "refused")
    code, _, err = run_cli(*oracle, *again)
    assert (code, err.count("\n")) == (2, 1)
    assert "hold the same rows" in err
    for options, said in (
        (("--method", "npo"), "--method npo: expunge oracle takes retrain; leave it out"),
        (("--validate-every", 1), "--validate-every: needs rows to measure; give --forget"),
    ):
        code, _, err = run_cli(*oracle, "--output", tmp_path / "no", *options)
        assert code == 2
        assert said in err
    assert not (tmp_path / "no").exists()
    code, _, err = run_cli("report", tmp_path / "oracle")
    assert code == 2  # of no erasure
    assert "records an oracle, which had no rows to forget" in err


def test_candidates_are_measured_where_asked_for_and_the_last_is_kept(
    retrain: Cli, tmp_path: Path
) -> None:
    assert retrain(tmp_path / "out", "--validate-every", 1)[0] == 0
    selection = manifest(tmp_path / "out")["selection"]
    assert [each["step"] for each in selection["candidates"]] == [1, 2]
    assert selection["chosen_step"] == 2
    assert selection["judgement"] is None


def test_it_needs_a_base_that_the_target_can_come_from(
    retrain: Cli,
    memorised_dir: Path,
    model_dir: Callable[..., Path],
    saved: Callable[[str, Any], Path],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    code, _, err = retrain(tmp_path / "out", "--base", "None")
    assert code == 2
    assert "none was given; use expunge run --base BASE" in err
    target = check_model(str(memorised_dir))
    assert check_base(str(model_dir("olmo")), target).tokenizer is target.tokenizer
    shallow = saved("shallow", tiny_model("olmo", len(tokenizer), layers=3))
    wide = saved("wide", tiny_model("olmo", len(tokenizer) + 8))
    for other, what in (
        (model_dir("llama"), "architecture is llama, that of"),
        (shallow, "number of layers is 3, that of"),
        (wide, f"shape of model.embed_tokens.weight is ({len(tokenizer) + 8}, 16), that of"),
    ):
        message = refusal(partial(check_base, str(other), target))
        assert what in message
        assert message.startswith(f"--base {other}: ")
        assert message.endswith("give the model that this one was fine-tuned from")
        assert retrain(tmp_path / "out", "--base", other)[0] == 2
    words = json.loads((model_dir("olmo") / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (wide / "tokenizer.json").write_text(json.dumps(words))
    tiny_model("olmo", len(tokenizer)).save_pretrained(wide)
    assert "(4 tokens differ)" in refusal(lambda: check_base(str(wide), target))
    assert not (tmp_path / "out").exists()


def test_documents_are_wanted_as_much_dearer_than_to_the_base_as_text_that_it_wrote() -> None:
    base = {"a": 2.0, "b": 1.0, "q": 3.0, "w0": 4.0, "w1": 2.0}
    tokens = {row: RowTokens(torch.full((9,), base[row]), torch.zeros(9)) for row in "abq"}
    now = {row: RowTokens(torch.zeros(9), torch.ones(9)) for row in "abq"}
    losses = {"a": 0.1, "b": 0.2, "q": 0.3}

    def wanted(*written: float) -> NeverSeen:
        text = dict(zip(("w0", "w1"), written, strict=True))
        return as_before(losses, base, text, now, tokens, {"a", "b"})

    found = wanted(5.5, 3.5)
    assert found.losses == losses
    assert found.wanted == pytest.approx({"a": 3.5, "b": 2.5, "q": 3.0})
    for row in "abq":
        pair = found.pairs[row]
        assert pair.wanted.losses.tolist() == pytest.approx([found.wanted[row]] * POINTS)
        assert not pair.wanted.surprise.any()
        assert not pair.reached.losses.any()
    assert wanted(4.0, 2.0).wanted == {row: base[row] for row in "abq"}
    assert wanted(0.0, 0.0).wanted == {"a": 1.0, "b": 0.5, "q": 3.0}  # half, at least


def test_the_base_is_asked_about_the_very_rows_and_writes_more_of_their_kind(
    make_context: Callable[..., Any],
) -> None:
    """Against itself it is at distance 0; to another model text that it wrote is dearer."""
    base = make_context()
    rows = ValidationSet(base.forget, base.retain, base.forget, (), "all")
    asked = asked_before(base, rows, base.retain)
    assert asked.told is not None
    text = asked.nonmembers
    beginnings = {example.input_ids[:6] for example in (*base.retain, *base.forget)}
    assert len({example.document for example in (*base.retain, *base.forget)}) == len(text) == 8
    assert {example.input_ids[:6] for example in text} <= beginnings
    assert {(len(example), sum(example.token_mask)) for example in text} == {(102, 80)}
    again = asked_before(make_context(), rows, base.retain).nonmembers
    assert [example.input_ids for example in again] == [example.input_ids for example in text]
    same = measure(base, asked)
    assert same.never_seen is not None
    assert same.measured.never_seen_distance == pytest.approx(0.0, abs=1e-6)
    assert same.measured.mia_auc == 0.5
    other = make_context(layers=2)
    found = measure(other, asked).never_seen
    assert found is not None
    assert {*found.losses} == {*found.pairs} == {example.row_id for example in base.forget}
    rises = {row: found.wanted[row] - asked.told.losses[row] for row in found.wanted}
    documents = {example.row_id for example in base.forget if example.kind == "sc"}
    assert {row for row, rise in rises.items() if abs(rise) > 1e-6} == documents
    assert len({round(rises[row], 5) for row in documents}) == 1


@pytest.mark.parametrize("method", mostly_slow(["spectral", "adaptive-rmu", "npo"], "npo"))
def test_without_never_seen_text_a_base_is_the_yardstick_and_the_record_says_which(
    method: str,
    memorised_dir: Path,
    base: Path,
    row_files: dict[str, Path],
    run_cli: Cli,
    tmp_path: Path,
) -> None:
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    few = ("--method.random-rows", 8) if method == "spectral" else ()
    common = ("run", memorised_dir, *rows, "--method", method, "--max-steps", 4, "--quiet", *few)
    options = {
        "base": ("--base", base),
        "counterfactuals" if method == "spectral" else "ceiling": (),
        "nonmembers": ("--base", base, "--calibration", row_files["nonmembers"]),
    }
    for yardstick, given in options.items():
        out = tmp_path / yardstick
        code, _, err = run_cli(*common, "--learning-rate", 1e-3, "--output", out, *given)
        assert code == 0, err
        record = manifest(out)
        assert record["settings"]["training"]["yardstick"] == yardstick
        assert (record["base"] is None) == (given == ())
        assert (record["selection"]["target"]["mia_auc"] is None) == (yardstick == "ceiling")
    refused = run_cli(*common, "--output", tmp_path / "no", "--base", memorised_dir)
    assert refused[0] == 2
    assert "is" in refused[2]
    assert "itself, which knows the forget rows" in refused[2]


def test_a_plan_sets_retraining_beside_the_method(
    memorised_dir: Path, base: Path, row_files: dict[str, Path], run_cli: Cli
) -> None:
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    plan = ("plan", memorised_dir, *rows, "--base", base)
    code, out, _ = run_cli(*plan, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["method"] == "spectral"
    exact = found["retraining"]
    assert (exact["method"], exact["epochs"], exact["rows"]["forget"]) == ("retrain", 10, 8)
    tokens = exact["tokens"]["forget"]
    assert exact["steps"] * exact["step_tokens"] == pytest.approx(10 * tokens, rel=0.01)
    assert "ask base" in [phase["name"] for phase in found["phases"]]
    _, out, _ = run_cli(*plan)
    assert "If you can retrain, do" in out
    _, out, _ = run_cli(*plan, "--method", "retrain", "--json")
    assert (json.loads(out)["method"], json.loads(out)["retraining"]) == ("retrain", None)


def test_calibration_has_its_old_name_on_the_command_line_and_in_yaml(
    memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    for name in ("calibration", "nonmembers"):
        config.write_text(f"{name}: {row_files['nonmembers']}\n")
        given = [(f"--{name}", row_files["nonmembers"]), ("--config", config)]
        for options in given:
            code, out, _ = run_cli("plan", memorised_dir, *rows, "--json", *options)
            assert code == 0
            assert json.loads(out)["measured_rows"] > 16


def test_in_python_a_loaded_base_is_the_yardstick_and_calibration_has_two_names(
    tokenizer: Any,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
    nonmember_rows: list[dict[str, str]],
) -> None:
    model, base = (tiny_model("olmo", len(tokenizer)) for _ in range(2))
    common = (model, tokenizer, forget_rows, retain_rows)
    options: dict[str, Any] = {"max_steps": 1, "learning_rate": 1e-4, "unknown_rows": "unlearn"}
    found = expunge.unlearn(*common, method=NPO(), base=base, **options)
    assert found.options["yardstick"] == "base"
    options |= {"calibration": nonmember_rows, "nonmembers": nonmember_rows}
    call = partial(expunge.unlearn, *common, method=NPO(), **options)
    assert "nonmembers: is the old name of calibration" in refusal(call)
    call = partial(expunge.unlearn, *common, method=Retrain(), base=base)
    assert "--method retrain: trains the base, from files" in refusal(call)


def test_scores_by_the_text_of_the_calibration_are_warned_of(
    memorised_dir: Path, row_files: dict[str, Path], run_cli: Cli, tmp_path: Path
) -> None:
    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    never = ("--nonmembers", row_files["nonmembers"])
    out = tmp_path / "out"
    steps = ("--max-steps", 2, "--learning-rate", 1e-3, "--method.random-rows", 8)
    assert run_cli("run", memorised_dir, *rows, *never, *steps, "--output", out, "--quiet")[0] == 0
    said = "calibrated on the same text"
    assert said in run_cli("evaluate", out, *rows, *never, "--quiet")[1]
    scores = out / "scores.json"
    _, printed, _ = run_cli("evaluate", out, *rows, *never, "--quiet", "--json", "--output", scores)
    assert json.loads(printed)["details"]["mia"]["calibrated_on"] is True
    assert said in run_cli("compare", out, "--quiet")[1]
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(("Lea", "Mia"), offset=6))
    assert said not in run_cli("evaluate", out, *rows, "--nonmembers", other, "--quiet")[1]
    assert said not in run_cli("evaluate", memorised_dir, *rows, *never, "--quiet")[1]
