"""Tasks of lm-evaluation-harness: figures by hand, from several processes, errors before weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharing import launched

from conftest import refusal, write_jsonl
from expunge.cli.evaluate import Evaluate
from expunge.data.tokenization import TextPolicy
from expunge.evaluation.harness import read_tasks, run_tasks
from expunge.evaluation.measuring import measure
from expunge.evaluation.passes import Passes
from expunge.evaluation.score_files import check_one_form
from expunge.evaluation.scorecard import Scorecard
from expunge.models.loading import check_model, load_model
from expunge.processes import OneProcess
from expunge.reporting.tables import scorecard_rows

Cli = Callable[..., tuple[int, str, str]]
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"Where was {name} born?", "choices": choices, "label": label}
    for name, choices, label in (
        ("Ada", ["Paris and her number", "Oslo", "Rome."], 0),
        ("Ben", ["Oslo", "Lima", "in a small house near the river"], 1),
        ("Cleo", ["Lima and more", "Cairo"], 0),
        ("Dov", ["the river of Rome", "Rome", "Delhi"], 1),
        ("Eva", ["Quito", "Accra and her number is 901"], 1),
        ("Finn", ["Delhi", "Paris", "Oslo", "Rome and Paris"], 3),
        ("Gus", ["A", "B", "C"], 2),
    )
]
KINDS = {
    "towns": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "towns_continued": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[label]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "towns_whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[label]}}"
metric_list: [{metric: byte_perplexity}]
""",
    "numbers": """
output_type: generate_until
doc_to_text: "{{input}}"
doc_to_target: "{{output}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
filter_list: [{name: bare, filter: [{function: remove_whitespace}, {function: take_first}]}]
""",
}


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory, forget_rows: list[dict[str, str]]) -> Path:
    """A directory with four tasks, one of each kind that the library has."""
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra harness")
    directory = tmp_path_factory.mktemp("tasks")
    write_jsonl(directory / "towns.jsonl", QUESTIONS)
    asked = [row for row in forget_rows if row["id"].endswith("qa0")]
    asked[-1] = asked[-1] | {"output": "another"}
    write_jsonl(directory / "numbers.jsonl", asked)
    for name, kind in KINDS.items():
        rows = directory / ("numbers.jsonl" if name == "numbers" else "towns.jsonl")
        write_task(directory, name, kind, rows)
    return directory


def write_task(directory: Path, name: str, kind: str, rows: Path) -> None:
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {rows}}}\n"
    (directory / f"{name}.yaml").write_text(f"{head}test_split: train\nmetadata: {{version: 2}}{kind}")


@pytest.fixture(scope="module")
def model(memorised_dir: Path) -> Any:
    return load_model(check_model(str(memorised_dir)), "float32", "cpu")


def passes_of(model: Any, tokenizer: Any, **changed: Any) -> Passes:
    policy = TextPolicy(128, vocabulary=len(tokenizer))
    given: dict[str, Any] = {"policy": policy, "batch_size": 2, "processes": OneProcess()} | changed
    return Passes(model, tokenizer, progress=lambda *_: None, **given)


def values_of(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {name: metric["value"] for name, metric in entry["metrics"].items()}
        for task, entry in scores.items()
    }


def log_probs(model: Any, tokenizer: Any, context: str, answer: str) -> torch.Tensor:
    """Of the answer's tokens after the context, one text at a time in float64."""
    before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
    whole = (
        tokenizer(context + answer)["input_ids"] if context else before + tokenizer(answer)["input_ids"]
    )
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return torch.stack([logits[i - 1, whole[i]] for i in range(len(before), len(whole))])


def test_figures_are_those_by_hand(
    include: Path, model: Any, tokenizer: Any, forget_rows: list[dict[str, str]]
) -> None:
    found, details = run_tasks(read_tasks(",".join(KINDS), include), passes_of(model, tokenizer))
    acc = norm = 0
    continued: list[float] = []
    whole = size = 0.0
    for row in QUESTIONS:
        choices = row["choices"]
        label = row["label"]
        prompt = f"Question: {row['question']}\nAnswer:"
        sums = [float(log_probs(model, tokenizer, prompt, f" {c}").sum()) for c in choices]
        acc += max(range(len(sums)), key=lambda i: sums[i]) == label
        norm += max(range(len(sums)), key=lambda i: sums[i] / len(choices[i])) == label
        question = row["question"]
        continued.append(float(log_probs(model, tokenizer, question, f" {choices[label]}").sum()))
        text = f"{question} {choices[label]}"
        whole += float(log_probs(model, tokenizer, "", text).sum())
        size += len(text.encode())
    values = values_of(found)
    assert 0 < acc < len(QUESTIONS)
    assert acc != norm
    assert values["towns"] == {"acc": acc / 7, "acc_norm": norm / 7}
    # float32 against float64, summed over a few dozen tokens.
    expected = math.exp(-sum(continued) / 7)
    assert values["towns_continued"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert values["towns_whole"]["byte_perplexity"] == pytest.approx(math.exp(-whole / size), rel=1e-4)
    assert values["numbers"] == {"exact_match (bare)": 0.75}  # of four numbers one was made another
    assert found["towns"] == {
        "rows": 7, "shots": 0, "version": 2,
        "metrics": {name: {"value": value, "good": "high"} for name, value in values["towns"].items()},
    }  # fmt: skip
    assert found["towns_whole"]["metrics"]["byte_perplexity"]["good"] == "low"
    assert details["cut"] == 0
    assert details["texts"] == sum(len(row["choices"]) for row in QUESTIONS) + 7 + 7 + 4
    assert tokenizer.pad_token == "<|pad|>"


@pytest.mark.slow
def test_two_launched_processes_find_what_one_does(
    include: Path, memorised_dir: Path, row_files: dict[str, Path], tmp_path: Path
) -> None:
    arguments: list[object] = [
        *(memorised_dir, "--forget", row_files["forget"], "--batch-size", 2, "--device", "cpu"),
        *("--harness", ",".join(KINDS), "--harness-include", include, "--json"),
    ]
    said = []
    for count in (1, 2):
        done = launched(count, arguments)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]
    assert set(json.loads(said[0])["harness"]) == set(KINDS)


def test_a_chat_template_and_its_fixed_date_reach_the_prompts(
    include: Path, model: Any, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = chat_tokenizer.chat_template
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ strftime_now('%d %b %Y') }}" + template)
    tasks = read_tasks("numbers", include)
    # The chat tokens have no embeddings: what is looked at is the prompts, so nothing is generated.
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM.generate_until", lambda _, asked, **__: [""] * len(asked)
    )
    policy = TextPolicy(128, chat_template=True)
    run_tasks(tasks, passes_of(model, chat_tokenizer, policy=policy))
    (first, *_) = [each.args[0] for each in tasks["tasks"]["numbers"].instances]
    assert first.startswith("26 Jul 2024<|im_start|>")
    assert first.endswith("<|im_start|>assistant\n")
    assert chat_tokenizer.chat_template.startswith("{{ strftime_now")


def test_texts_beyond_the_context_are_counted(include: Path, model: Any, tokenizer: Any) -> None:
    tasks = read_tasks("towns", include)
    passes = passes_of(model, tokenizer, policy=TextPolicy(16, vocabulary=len(tokenizer)))
    lengths = [
        len(tokenizer(f"Question: {row['question']}\nAnswer: {choice}")["input_ids"])
        for row in QUESTIONS
        for choice in row["choices"]
    ]
    assert run_tasks(tasks, passes)[1]["cut"] == sum(length > 17 for length in lengths) > 0


def test_the_command_shows_and_writes_them_and_compare_too(
    include: Path,
    memorised_dir: Path,
    oracle_dir: Path,
    row_files: dict[str, Path],
    run_cli: Cli,
    tmp_path: Path,
) -> None:
    scores = {}
    for name, directory in (("target", memorised_dir), ("oracle", oracle_dir)):
        scores[name] = tmp_path / f"{name}.json"
        code, out, err = run_cli(
            *(
                "evaluate",
                directory,
                "--forget",
                row_files["forget"],
                "--output",
                scores[name],
                "--quiet",
            ),
            *("--harness", "towns,numbers", "--harness-include", include),
        )
        assert (code, err) == (0, "")
    assert "harness numbers exact_match (bare)" in out
    written = json.loads(scores["target"].read_text())
    assert written["utility"] is written["final_score"] is None  # by name, never in their place
    assert values_of(written["harness"])["numbers"] == {"exact_match (bare)": 0.75}
    code, out, err = run_cli("compare", scores["oracle"], "--original", scores["target"], "--markdown")
    assert (code, err) == (0, "")
    assert "| harness numbers exact_match (bare) | 0-1 | high | 0.750 | 0.000 |" in out
    # Other tasks of the same model: nothing of the first measurement comes back.
    code, out, _ = run_cli(
        *("evaluate", memorised_dir, "--forget", row_files["forget"], "--json", "--quiet"),
        *("--harness", "towns_whole", "--harness-include", include),
    )
    assert (code, set(json.loads(out)["harness"])) == (0, {"towns_whole"})


def test_a_group_with_a_metric_is_one_task_and_its_members_are_parts(
    include: Path, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, first in (("few", 0), ("many", 2)):
        rows = write_jsonl(tmp_path / f"{name}.jsonl", QUESTIONS[first : first + 2 + first])
        write_task(tmp_path, name, KINDS["towns"], rows)
    metric = "[{metric: acc, aggregation: mean, weight_by_size: true}]"
    (tmp_path / "all.yaml").write_text(
        f"group: all\ntask: [few, many]\naggregate_metric_list: {metric}\nmetadata: {{version: 3}}\n"
    )
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(_own_tasks, harness_manager()))
    found, details = run_tasks(read_tasks("all", tmp_path), passes_of(model, tokenizer))
    parts = values_of(details["parts"])
    mean = (2 * parts["few"]["acc"] + 4 * parts["many"]["acc"]) / 6
    assert values_of(found) == {"all": {"acc": pytest.approx(mean)}}
    assert found["all"]["rows"] == 6


ROW = {"question": "Who?", "choices": ["Ada", "Ben"], "label": 1}


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("numbrs", None, "--harness numbrs: unknown; did you mean numbers"),
        ("absent", None, "--harness absent: cannot be loaded (Unable to find '"),
        ("empty", [ROW, ROW | {"choices": None}], "--harness empty: cannot be loaded ("),
        ("beyond", [ROW, ROW | {"label": 2}], "--harness beyond: the answer of row 2 is none of its 2"),
        ("no_label", [ROW | {"label": -1}], "--harness no_label: the answer of row 1 is none of its 2"),
        ("towns,,absent", None, "--harness absent: cannot be loaded ("),
        (" , ", None, "--harness: names no task"),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_model_is_loaded(
    name: str,
    rows: list[dict[str, Any]] | None,
    said: str,
    include: Path,
    memorised_dir: Path,
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in include.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    task = name.rpartition(",")[2]
    write_task(tmp_path, "absent", KINDS["towns"], tmp_path / "nowhere.jsonl")
    if rows is not None:
        write_task(tmp_path, task, KINDS["towns"], write_jsonl(tmp_path / f"{task}.jsonl", rows))
    # The library's own 14,000 files take too long here: of an unknown name the user's are searched.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(_own_tasks, harness_manager()))
    monkeypatch.setattr("expunge.evaluation.measuring.load_model", lambda *_: pytest.fail("loaded"))
    inputs = Evaluate(
        str(memorised_dir), str(row_files["forget"]), harness=name, harness_include=str(tmp_path)
    )
    assert refusal(lambda: measure(inputs)).startswith(said)


def harness_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager


def _own_tasks(manager: Any, include_path: str, include_defaults: bool = True) -> Any:
    del include_defaults
    return manager(include_path=include_path, include_defaults=False)


@pytest.mark.slow
def test_rows_of_the_hub_that_cannot_be_had_name_the_task() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra harness")
    message = refusal(lambda: read_tasks("arc_easy"))  # tests reach no hub
    assert message.startswith("--harness arc_easy: cannot be loaded (Couldn't reach")
    assert refusal(lambda: read_tasks("hellaswagg")).startswith(
        "--harness hellaswagg: unknown; did you mean hellaswag"
    )


def test_without_the_library_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.evaluation.harness.importlib.util.find_spec", lambda _: None)
    assert refusal(lambda: read_tasks("arc_easy")) == (
        "--harness: needs lm-eval, which is not installed; run pip install '.[harness]' in the clone of"
        " expunge"
    )


def card_with(details: Any = None, **entry: Any) -> Scorecard:
    metrics = {"acc": {"value": 0.5, "good": "high"}}
    values = {"forget": {}, "retain": {}, "harness": {"t": {"metrics": metrics, "rows": 7} | entry}}
    totals = ("task_aggregate", "mia_auc", "mia_score", "utility", "final_score")
    values["details"] = {} if details is None else {"harness": details}
    return Scorecard.from_json(dict.fromkeys(totals) | values)


def test_tasks_are_compared_only_where_they_are_the_same() -> None:
    bits = {"word_perplexity": {"value": 31.5, "good": "low"}}
    rows = scorecard_rows({"a": card_with(), "b": card_with(metrics=bits)})[:2]
    assert rows == [
        ["harness t acc", "0-1", "high", "0.500", "-"],
        ["harness t word_perplexity", "-", "low", "-", "31.500"],
    ]
    check_one_form({"a": card_with(), "b": card_with()})
    for other in ({"rows": 8}, {"version": 3}, {"shots": 5}):
        message = refusal(partial(check_one_form, {"a": card_with(), "b": card_with(**other)}))
        assert message.startswith(
            "b: its harness task t has other rows, shots, version or lm-eval than a's"
        )


def test_another_library_and_another_number_of_cut_texts_are_no_comparison() -> None:
    usual = {"version": "0.4.9", "cut": 0}
    cards = {"a": card_with(usual), "b": card_with(dict(usual)), "c": card_with([])}
    check_one_form({name: cards[name] for name in "ab"})
    assert "lm-eval than a's" in refusal(lambda: check_one_form(cards))
    other = card_with({**usual, "version": "0.4.10"})
    assert "lm-eval than a's" in refusal(lambda: check_one_form({"a": cards["a"], "b": other}))
    message = refusal(lambda: check_one_form({"a": cards["a"], "b": card_with({**usual, "cut": 3})}))
    assert message.startswith("b: its harness t lost the start of more or fewer texts than a's; measure")


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (None, "harness t holds null"),
        ({"acc": 0.5}, "harness t acc holds 0.5 where names"),
        ({"acc": {"value": "x", "good": "high"}}, "harness t acc holds text"),
        ({"acc": {"value": math.inf, "good": "high"}}, "harness t acc holds inf"),
        ({"acc": {"value": 0.5}}, "harness t acc: does not say whether high or low is good"),
    ],
)
def test_an_entry_that_holds_no_scores_is_named(metrics: Any, said: str) -> None:
    assert refusal(lambda: card_with(metrics=metrics)).startswith(said)
