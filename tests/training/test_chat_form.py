"""A target that was taught in chats: its template is found, recorded, and what later commands take."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CHATML, learn, refusal, tiny_model, write_jsonl
from expunge.analysis.template_choice import ROWS, chosen, evenly, read_form
from expunge.data.rows import Row, as_rows
from expunge.data.tokenization import TextPolicy, encode_rows
from expunge.maths.numerics import is_known
from expunge.methods.retrain import Retrain
from expunge.models.loading import check_model, resolve_dtype, said_of_dtype
from expunge.training.options import TrainingOptions
from expunge.training.preparation import prepare

Rows = list[dict[str, str]]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def chat_dir(
    tmp_path_factory: pytest.TempPathFactory,
    chat_tokenizer: Any,
    forget_rows: Rows,
    retain_rows: Rows,
) -> Path:
    """A tiny Llama that learned its rows as chats."""
    model = tiny_model("llama", len(chat_tokenizer))
    rows = forget_rows + retain_rows
    learn(model, chat_tokenizer, rows, steps=500, chat_template=True)
    path = tmp_path_factory.mktemp("chat")
    model.save_pretrained(path)
    chat_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def both(row_files: dict[str, Path]) -> tuple[object, ...]:
    return ("--forget", row_files["forget"], "--retain", row_files["retain"])


def text_of(path: Path) -> Any:
    found = json.loads(path.read_text())
    return found["details"]["text"] if "details" in found else found["settings"]["training"]["text"]


@pytest.mark.parametrize(
    "method",
    [("gradient-difference",), ("adaptive-rmu", "--method.layer", 2, "--select", "last")],
    ids=["whole", "in parts"],
)
def test_the_template_is_found_recorded_and_taken(
    method: tuple[object, ...], chat_dir: Path, both: Any, tmp_path: Path, run_cli: Cli
) -> None:
    out, scores, before = tmp_path / "out", tmp_path / "out.json", tmp_path / "before.json"
    asked = ("--method", *method, "--max-steps", 2, *both)
    code, _, said = run_cli("run", chat_dir, *asked, "--output", out)
    assert code == 0, said
    assert "chat template on: of the answers of 16 rows the model gives" in said
    text = text_of(out / "expunge.json")
    assert text["chat_template"] is True
    choice = text["template_choice"]
    assert choice["on"]["accuracy"] > 0.8 > 0.3 > choice["off"]["accuracy"]
    assert choice["on"]["forget_known"] == 1
    code, _, said = run_cli("evaluate", out, *both, "--output", scores)
    assert code == 0, said
    assert "chat template on: as expunge.json records" in said
    assert text_of(scores)["template_choice"] == {"by": "expunge.json"}
    # The target has no record: it is asked both ways.
    assert run_cli("evaluate", chat_dir, *both, "--output", before)[0] == 0
    assert text_of(before)["chat_template"] is True
    assert text_of(before)["template_choice"]["by"] == "sampled rows"
    assert json.loads(before.read_text())["task_aggregate"] == 0
    assert run_cli("compare", scores, "--target", before)[0] == 0


def test_scores_of_different_forms_are_not_compared(
    chat_dir: Path, both: Any, tmp_path: Path, run_cli: Cli
) -> None:
    for name, given in (("on", ()), ("off", ("--no-chat-template",))):
        output = ("--output", tmp_path / f"{name}.json", "--quiet")
        assert run_cli("evaluate", chat_dir, *both, *given, *output)[0] == 0
    code, out, said = run_cli("compare", tmp_path / "on.json", tmp_path / "off.json")
    assert (code, out) == (2, "")
    assert "on: was measured with the chat template, off without; measure both again" in said


def test_a_model_that_is_not_taught_by_the_template_is_asked_without(
    memorised_dir: Path, tokenizer: Any, forget_rows: Rows, retain_rows: Rows
) -> None:
    from transformers import AutoModelForCausalLM

    import expunge

    templated = copy.deepcopy(tokenizer)
    templated.chat_template = CHATML.replace("Be of help.", "")
    model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32)
    card = expunge.evaluate(model, templated, forget_rows, retain_rows)
    text = card.details["text"]
    assert text["chat_template"] is False
    assert text["template_choice"]["off"]["accuracy"] == 1
    assert expunge.evaluate(model, tokenizer, forget_rows).details["text"]["template_choice"] is None


def test_a_sample_is_read_as_row_by_row_greedy_choices_say(
    chat_dir: Path, chat_tokenizer: Any, forget_rows: Rows, retain_rows: Rows
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chat_dir, dtype=torch.float32)
    sides = as_rows(forget_rows, "forget").rows, as_rows(retain_rows, "retain").rows
    read = []
    for on in (False, True):
        policy = TextPolicy(128, chat_template=on)
        read.append(read_form(model, chat_tokenizer, policy, *sides, torch.device("cpu")))
        shares, means, known = [], [], []
        for rows, eos in zip(sides, (False, True), strict=True):
            for example in encode_rows(rows, chat_tokenizer, policy, eos=eos):
                logits = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
                places = [n for n, flag in enumerate(example.answer_mask) if flag]
                right = [int(logits[n - 1].argmax()) == example.input_ids[n] for n in places]
                begun = (right.index(False) if False in right else len(right)) / len(right)
                shares.append(begun)
                means.append(
                    sum(float(logits[n - 1, example.input_ids[n]]) for n in places) / len(places)
                )
                if not eos:
                    known.append(is_known(begun, len(places)))
        assert read[-1].rows == len(shares) == 16
        assert read[-1].accuracy == pytest.approx(sum(shares) / len(shares))
        assert read[-1].log_prob == pytest.approx(sum(means) / len(means), rel=1e-4)
        assert read[-1].forget_known == sum(known) / len(known)
        assert read[-1].forget_accuracy == pytest.approx(sum(shares[:8]) / 8)
    policies = [TextPolicy(128), TextPolicy(128, chat_template=True)]
    assert chosen(policies, read).chat_template
    assert not chosen(policies, read[::-1]).chat_template
    assert not chosen(policies, [read[0], read[0]]).chat_template  # as it was before, of equals


def test_a_sample_is_spread_over_the_rows() -> None:
    rows = [Row(str(n), "a", "b") for n in range(100)]
    numbers = [int(row.id) for row in evenly(rows)]
    assert len(set(numbers)) == ROWS
    assert numbers[0] == 0
    assert {b - a for a, b in itertools.pairwise(numbers)} == {3, 4}
    assert evenly(rows[:3]) == tuple(rows[:3])


@pytest.mark.slow
def test_an_adapter_and_other_commands_find_the_template(
    chat_dir: Path, both: Any, tmp_path: Path, run_cli: Cli
) -> None:
    """MODEL as base and adapter; an audit and influences of a run's result and of its target."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chat_dir, dtype=torch.float32)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    get_peft_model(model, settings).save_pretrained(adapter)
    asked = ("--method", "gradient-difference", "--max-steps", 2, "--learning-rate", 1e-2, *both)
    code, _, said = run_cli("run", adapter, *asked, "--output", out)
    assert code == 0, said
    assert text_of(out / "expunge.json")["template_choice"]["on"]["forget_known"] == 1
    assert run_cli("evaluate", adapter, *both, "--output", tmp_path / "scores.json")[0] == 0
    assert text_of(tmp_path / "scores.json")["chat_template"] is True
    files = [tmp_path / f"{name}.json" for name in ("audit", "plain", "influence")]
    attack = ("--original", adapter, "--attacks", "direct", *both)
    assert run_cli("audit", out, *attack, "--output", files[0])[0] == 0
    assert run_cli("analyze", "influence", adapter, *both, "--output", files[2])[0] == 0
    audit, influence = (json.loads(file.read_text()) for file in (files[0], files[2]))
    assert audit["settings"]["text"]["template_choice"] == {"by": "expunge.json"}
    assert influence["settings"]["chat_template"] is True
    # A result that no run of ours recorded: the target says how both are asked.
    (out / "expunge.json").unlink()
    code, _, said = run_cli("audit", out, *attack, "--output", files[1])
    assert code == 0, said
    text = json.loads(files[1].read_text())["settings"]["text"]
    assert (text["chat_template"], text["template_choice"]["by"]) == (True, "sampled rows")


@pytest.mark.slow
def test_a_sweep_asks_every_trial_as_the_target_answers(
    chat_dir: Path, both: Any, tmp_path: Path, run_cli: Cli
) -> None:
    searched = ("--search", "learning_rate=log:1e-5:1e-4", "--trials", 1, "--max-steps", 1)
    asked = ("--method", "gradient-difference", "--objectives", "aggregate", *searched, *both)
    code, _, said = run_cli("sweep", chat_dir, *asked, "--output", tmp_path / "sweep")
    assert code == 0, said
    assert "chat template on: of the answers" in said
    assert "chat_template: 'on'" in (tmp_path / "sweep" / "best.yaml").read_text()


def test_retraining_is_told_the_form(chat_dir: Path, forget_rows: Rows, retain_rows: Rows) -> None:
    """No target is loaded there that could tell."""
    checked = check_model(str(chat_dir))
    model = (checked.config, checked.layout, checked.tokenizer)

    def prepared(template: Any) -> Any:
        options = TrainingOptions(chat_template=template)
        rows = (forget_rows, retain_rows, None)
        return prepare(Retrain(), options, *model, *rows, has_base=True)

    assert "retraining asks no target that could tell; give on" in refusal(lambda: prepared("auto"))
    assert prepared("on").policy.chat_template


def test_a_plan_is_of_the_longer_form(chat_dir: Path, both: Any, run_cli: Cli) -> None:
    plans = {}
    for given in ("auto", "on", "off"):
        code, out, said = run_cli("plan", chat_dir, *both, "--chat-template", given, "--json")
        assert code == 0, said
        plans[given] = json.loads(out)
    assert plans["auto"]["tokens"] == plans["on"]["tokens"] != plans["off"]["tokens"]
    assert any("reads a sample" in warning for warning in plans["auto"]["warnings"])
    assert not any("--chat-template" in warning for warning in plans["off"]["warnings"])


@pytest.mark.parametrize(
    ("words", "lines", "found"),
    [
        (["--chat-template"], "", "on"),
        (["--chat-template", "--quiet"], "", "on"),
        (["--no-chat-template"], "", "off"),
        (["--chat-template", "auto"], "", "auto"),
        ([], "chat_template: true", "on"),
        ([], "chat-template: off", "off"),
        ([], "chat_template: auto", "auto"),
        (["--chat-template", "off"], "chat_template: true", "off"),
        ([], "", "auto"),
    ],
)
def test_the_earlier_words_for_it_still_hold(
    words: list[str], lines: str, found: str, tmp_path: Path
) -> None:
    from expunge.cli.options import parse
    from expunge.cli.run import parsed
    from expunge.evaluation.measuring import MeasureInputs
    from expunge.runs.run import RunInputs

    config = tmp_path / "config.yaml"
    config.write_text(f"forget: F\n{lines}\n")
    words = ["MODEL", "--config", str(config), *[word for word in words if word != "--quiet"]]
    assert parse(MeasureInputs, words, "test").chat_template == found
    settings, _ = parsed([*words, "--output", "O"], "test", RunInputs, "about")
    assert settings.training.chat_template == found


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")],
)
def test_a_model_runs_in_the_dtype_of_its_files(
    stored: str,
    expected: str,
    tokenizer: Any,
    row_files: dict[str, Path],
    tmp_path: Path,
    run_cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out, both = tmp_path / "model", tmp_path / "out", ("--forget", row_files["forget"])
    tiny_model("olmo", len(tokenizer)).to(getattr(torch, stored)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    checked = check_model(str(model))
    assert resolve_dtype(checked, "auto") == expected
    assert resolve_dtype(checked, "float16") == "float16"
    for native in (True, False):
        monkeypatch.setattr("expunge.models.kernels._has_bfloat16", lambda native=native: native)
        said = said_of_dtype(checked, "auto", "cpu")
        assert any("run in float32" in line for line in said) == (stored == "float16")
        slow = stored == "bfloat16" and not native
        assert any("no instructions for bfloat16" in line for line in said) == slow
    asked = ("--retain", row_files["retain"], "--unknown-rows", "unlearn", "--max-steps", 1)
    method = ("--method", "adaptive-rmu", "--method.layer", 2, "--output", out)
    assert run_cli("run", model, *both, *asked, *method)[0] == 0
    assert json.loads((out / "expunge.json").read_text())["settings"]["training"]["dtype"] == expected
    assert run_cli("evaluate", out, *both, "--output", tmp_path / "s.json", "--quiet")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["details"]["dtype"] == expected
    _, written, _ = run_cli("plan", model, *both, *asked[:2], "--json")
    assert json.loads(written)["dtype"] == expected


def test_rows_of_several_turns_are_chats(
    chat_dir: Path, forget_rows: Rows, retain_rows: Rows, tmp_path: Path, run_cli: Cli
) -> None:
    """The system prompt and the earlier turns of a row are asked with it, in ShareGPT's form as well."""
    turns = [
        ("system", "Be of help."),
        ("human", "Hi"),
        ("gpt", "Hello"),
        ("human", "{0}"),
        ("gpt", "{1}"),
    ]
    files = []
    for name, rows in (("forget", forget_rows), ("retain", retain_rows)):
        written: list[Any] = [
            {
                "conversations": [
                    {"from": who, "value": text.format(row["input"], row["output"])}
                    for who, text in turns
                ]
            }
            for row in rows
        ]
        files += [f"--{name}", write_jsonl(tmp_path / f"{name}.jsonl", written)]
    code, out, said = run_cli("evaluate", chat_dir, *files, "--chat-template", "on", "--json")
    assert code == 0, said
    assert json.loads(out)["details"]["questions"]["forget"]["asked"] == len(forget_rows)
