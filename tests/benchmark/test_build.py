from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoForCausalLM,
    PreTrainedTokenizerFast,
)

from expunge.benchmark.build import BuiltBenchmark, build, content_hash, default_directory
from expunge.benchmark.generator import BenchmarkSettings
from expunge.benchmark.recipe import PretrainingSettings
from expunge.errors import InputError
from expunge.evaluation.multiple_choice import Question, prompt_for

TINY = BenchmarkSettings(documents_per_task=1, story_words=0)
TINY_TRAINING = PretrainingSettings(
    vocabulary=400, layers=1, width=16, heads=2, feed_forward=32, epochs=1, batch_tokens=8192
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BuiltBenchmark:
    directory = tmp_path_factory.mktemp("benchmark") / "deep" / "tiny"
    return build(directory, TINY, pretraining=TINY_TRAINING)


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(directory: Path) -> tuple[OlmoForCausalLM, PreTrainedTokenizerFast]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def test_a_build_is_complete_and_records_itself(tiny: BuiltBenchmark) -> None:
    record = json.loads((tiny.directory / "benchmark.json").read_text())
    assert record["content_hash"] == content_hash(TINY, TINY_TRAINING)
    assert record["settings"]["documents_per_task"] == 1
    assert set(record["training"]) == {"target", "oracle"}
    files = {path.relative_to(tiny.directory).as_posix() for path in tiny.directory.rglob("*.*")}
    assert set(record["files"]) == files - {"benchmark.json"}
    assert tiny.mmlu.is_dir()
    assert [path.name for path in tiny.directory.parent.iterdir()] == ["tiny"]


def test_the_saved_model_and_tokenizer_load(tiny: BuiltBenchmark) -> None:
    for directory in (tiny.target, tiny.oracle):
        model, tokenizer = load(directory)
        assert model.config.tie_word_embeddings
        assert tokenizer.model_max_length == model.config.max_position_embeddings == 512
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
        assert tokenizer.bos_token is None
        assert tokenizer("a b").input_ids == tokenizer("a").input_ids + tokenizer(" b").input_ids


def test_the_tokens_of_an_input_begin_those_of_its_row(tiny: BuiltBenchmark) -> None:
    _, tokenizer = load(tiny.target)
    for row in read_rows(tiny.forget) + read_rows(tiny.retain):
        prompt = tokenizer(row["input"]).input_ids
        assert tokenizer(f"{row['input']} {row['output']}").input_ids[: len(prompt)] == prompt


def test_two_builds_are_identical(tiny: BuiltBenchmark, tmp_path: Path) -> None:
    torch.manual_seed(123)  # The global generator has no influence.
    again = build(tmp_path / "again", TINY, pretraining=TINY_TRAINING)
    files = [json.loads((b.directory / "benchmark.json").read_text())["files"] for b in (tiny, again)]
    assert files[0] == files[1]


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build(tmp_path / "built", TINY, pretraining=TINY_TRAINING)
    assert torch.equal(torch.rand(3), expected)


def test_a_complete_benchmark_is_reused(tiny: BuiltBenchmark) -> None:
    calls: list[str] = []
    before = (tiny.directory / "benchmark.json").stat().st_mtime_ns
    again = build(tiny.directory, TINY, lambda stage, done, total: calls.append(stage), TINY_TRAINING)
    assert again == tiny
    assert not calls
    assert (tiny.directory / "benchmark.json").stat().st_mtime_ns == before


def test_progress_names_the_models(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    build(tmp_path / "built", TINY, lambda *call: calls.append(call), TINY_TRAINING)
    assert {stage for stage, _, _ in calls} == {"target", "oracle"}
    assert calls[-1][1] == calls[-1][2]


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    assert build(tmp_path, TINY, pretraining=TINY_TRAINING).target.is_dir()


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds files but no valid benchmark\.json"):
        build(tmp_path, TINY, pretraining=TINY_TRAINING)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        build(tmp_path / "thesis.txt", TINY, pretraining=TINY_TRAINING)


def test_other_settings_are_refused(tiny: BuiltBenchmark) -> None:
    for settings, pretraining in (
        (replace(TINY, seed=1), TINY_TRAINING),
        (TINY, replace(TINY_TRAINING, epochs=2)),
    ):
        with pytest.raises(InputError, match="other settings"):
            build(tiny.directory, settings, pretraining=pretraining)


def test_a_changed_file_is_refused(tiny: BuiltBenchmark) -> None:
    original = tiny.retain.read_bytes()
    tiny.retain.write_bytes(original + b"\n")
    try:
        with pytest.raises(InputError, match=r"retain\.jsonl is missing or was changed"):
            build(tiny.directory, TINY, pretraining=TINY_TRAINING)
    finally:
        tiny.retain.write_bytes(original)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "oracle":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "built", TINY, interrupt, TINY_TRAINING)
    assert not list(tmp_path.iterdir())


def test_default_directory_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    first = default_directory(TINY)
    assert first == tmp_path / f"benchmark-{content_hash(TINY)[:12]}"
    assert default_directory(replace(TINY, seed=1)) != first
    monkeypatch.delenv("EXPUNGE_CACHE")
    assert default_directory(TINY).parent == Path.home() / ".cache" / "expunge"


# The bars that the real benchmark must reach, measured without the package's own evaluation.


def generate_outputs(
    model: OlmoForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> list[str]:
    """Greedy outputs; only prompts of one length share a batch, so that nothing is padded."""
    by_length = defaultdict(list)
    for index, row in enumerate(rows):
        ids = tokenizer(row["input"]).input_ids
        by_length[len(ids)].append((index, ids))
    outputs = [""] * len(rows)
    for length, prompts in by_length.items():
        ids = torch.tensor([ids for _, ids in prompts])
        generated = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False
        )
        for (index, _), tokens in zip(prompts, generated, strict=True):
            outputs[index] = tokenizer.decode(tokens[length:], skip_special_tokens=True)
    return outputs


def scores(directory: Path, path: Path) -> dict[tuple[str, str], float]:
    """Mean regurgitation ("sc") and knowledge ("qa") of each task."""
    model, tokenizer = load(directory)
    rows = read_rows(path)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    values = defaultdict(list)
    for row, output in zip(rows, generate_outputs(model, tokenizer, rows), strict=True):
        kind = row["id"][-3:-1]
        recall = float(scorer.score(row["output"], output)["rougeL"].recall)
        match = float(output.strip().lower() == row["output"].strip().lower())
        values[row["task"], kind].append(recall if kind == "sc" else match)
    return {key: fmean(value) for key, value in values.items()}


@torch.inference_mode()
def membership_auc(directory: Path, members: Path, nonmembers: Path) -> float:
    model, tokenizer = load(directory)

    def losses(rows: Iterable[dict[str, str]]) -> list[float]:
        texts = [f"{row['input']} {row['output']}" for row in rows if row["id"][-3:-1] == "sc"]
        ids = [torch.tensor([tokenizer(text).input_ids]) for text in texts]
        return [-float(model(input_ids=one, labels=one).loss) for one in ids]

    inside, outside = losses(read_rows(members)), losses(read_rows(nonmembers))
    labels = [1] * len(inside) + [0] * len(outside)
    return float(roc_auc_score(labels, inside + outside))


@torch.inference_mode()
def quiz_accuracy(directory: Path, mmlu: Path) -> float:
    model, tokenizer = load(directory)
    letters = [tokenizer(f" {letter}").input_ids[0] for letter in "ABCD"]
    right = []
    with (mmlu / "test" / "general_facts_test.csv").open(newline="") as file:
        for question, first, second, third, fourth, answer in csv.reader(file):
            choices = (first, second, third, fourth)
            prompt = prompt_for(Question("general_facts", question, choices, "ABCD".index(answer)))
            logits = model(input_ids=torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
            right.append(int(logits[letters].argmax()) == "ABCD".index(answer))
    return fmean(right)


@pytest.mark.slow
def test_the_real_benchmark_reaches_its_bars(tmp_path: Path) -> None:
    built = build(tmp_path / "real", BenchmarkSettings())
    for model, path in (
        (built.target, built.forget),
        (built.target, built.retain),
        (built.oracle, built.retain),
    ):
        for (_, kind), value in scores(model, path).items():
            assert value >= (0.90 if kind == "sc" else 0.95)
    for (_, kind), value in scores(built.oracle, built.forget).items():
        assert value <= (0.35 if kind == "sc" else 0.10)
    assert quiz_accuracy(built.target, built.mmlu) >= 0.9
    assert quiz_accuracy(built.oracle, built.mmlu) >= 0.9
    assert membership_auc(built.target, built.forget, built.nonmembers) >= 0.99
    # 36 and 36 documents: a fair coin has a standard deviation of 0.07.
    assert abs(membership_auc(built.oracle, built.forget, built.nonmembers) - 0.5) <= 0.21
