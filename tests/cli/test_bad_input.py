"""Wrong input: exit code 2, one line that names the fault and the mend, nothing read or written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import refusal, write_jsonl
from expunge.cli.options import GONE
from expunge.errors import InputError, RunError
from expunge.processes import check_alone, launched

Cli = Callable[..., tuple[int, str, str]]
CANARY = "canary-4711"
TOTALS = ("task_aggregate", "mia_auc", "mia_score", "utility", "final_score")
UNMEASURED: dict[str, object] = {"forget": {}, "retain": {}, **dict.fromkeys(TOTALS)}


@pytest.fixture
def places(
    model_dir: Callable[[str], Path],
    row_files: dict[str, Path],
    quiz_dir: Path,
    tmp_path: Path,
) -> dict[str, Path]:
    """Everything that the cases below name in braces."""
    found = {"model": model_dir("olmo"), "quiz": quiz_dir, **row_files}
    for name in ("pickled", "truncated", "mute"):
        found[name] = Path(shutil.copytree(found["model"], tmp_path / name))
    (found["pickled"] / "model.safetensors").unlink()
    torch.save({}, found["pickled"] / "pytorch_model.bin")
    with (found["truncated"] / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    (found["mute"] / "tokenizer.json").unlink()
    rows = {"empty": [], "long": [{"id": "wide", "input": f"{CANARY} " * 99, "output": "x"}]}
    for name, content in rows.items():
        found[name] = write_jsonl(tmp_path / f"{name}.jsonl", content)
    texts = {
        "secret": f"id,input,output\n1,{CANARY},\n",
        "unknown_key": "epoch: 3\n",
        "unknown_setting": "method:\n  name: libu\n  rnk: 4\n",
        "wrong_type": "epochs: two\n",
        "broken": "epochs: [3\n",
        "evaluate_key": "forgot: x\n",
        "inspect_key": "modl: x\n",
        "compare_key": "orakle: x\n",
        "repeated": "epochs: 1\nseed: 2\nepochs: 3\n",
        "repeated_setting": "method:\n  rank: 4\n  rank: 8\n",
        "two_spellings": "batch-size: 1\nbatch_size: 2\n",
        "two_places": "method:\n  rank: 4\nmethod.rank: 8\n",
        "yaml_digits": f"seed: 0x{'f' * 6000}\n",
        "list": "[1, 2]",
        "alias": "a: &a\n  b: *a\n",
        "digits": f'{{"input": {"9" * 5000}, "output": "x"}}\n',
        "deep": "[" * 100_000 + "\n",
        "cell": json.dumps({**UNMEASURED, "forget": {"Task1": {"regurgitation": CANARY}}}),
    }
    for name, text in texts.items():
        suffix = {
            "secret": "csv",
            "list": "json",
            "cell": "json",
            "digits": "jsonl",
            "deep": "jsonl",
        }.get(name, "yaml")
        found[name] = tmp_path / f"{name}.{suffix}"
        found[name].write_text(text)
    found["taken"] = tmp_path / "taken"
    found["taken"].mkdir()
    (found["taken"] / "thesis.txt").write_text("mine")
    return found | {"new": tmp_path / "out", "nowhere": tmp_path / "no" / "where"}


RUN = "run {model} --forget {forget} --retain {retain} --output {new} "
RUN_ON = "run {%s} --forget {forget} --retain {retain} --output {new}"
EVALUATE = "evaluate {model} --forget {forget} "
EVALUATE_ON = "evaluate {%s} --forget {forget}"
AUDIT = "audit {model} --original {model} --forget {forget} --retain {retain} "
INSPECT = "data inspect {forget} --model {model} "
INSPECT_ON = "data inspect {forget} --model {%s}"

MODELS = {
    "nowhere": ("{nowhere}: no such model directory", "give the folder"),
    "pickled": ("{pickled}: holds pickled weights only", "convert them"),
    "truncated": ("{truncated}/model.safetensors: is not a whole safetensors file",),
    "mute": ("{mute}: has no tokenizer", "tokenizer.save_pretrained"),
}
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    **{
        f"{command.split()[0]} on {model}": (command % model, words)
        for command in (RUN_ON, EVALUATE_ON, INSPECT_ON)
        for model, words in MODELS.items()
    },
    "run same rows": (RUN + "--retain {forget}", ("{forget}", "give two different sets")),
    "run empty": (RUN + "--forget {empty}", ("{empty}: is empty", "give a file with rows")),
    "run faulty row": (RUN + "--retain {secret}", ("{secret} line 2: column 'output' is empty",)),
    "run long row": (RUN + "--retain {long}", ("row 'wide'", "128", "--long-rows window")),
    "run layer": (
        RUN + "--method adaptive-rmu --method.layer 9",
        ("--method.layer 9", "choose 2 to 3"),
    ),
    "run option": (RUN + "--epoch 3", ("--epoch", "did you mean --epochs?")),
    "run setting": (RUN + "--method.target all", ("--method.target", "mean --method.targets?")),
    "run key": (RUN + "--config {unknown_key}", ("{unknown_key}", "'epoch'", "'epochs'")),
    "run method key": (RUN + "--config {unknown_setting}", ("'method.rnk'", "'method.rank'")),
    "run broken yaml": (RUN + "--config {broken}", ("{broken} line 2: is not YAML",)),
    "run repeated key": (RUN + "--config {repeated}", ("line 1", "has 'epochs' twice")),
    "run repeated setting": (RUN + "--config {repeated_setting}", ("line 2", "has 'rank' twice")),
    "run two spellings": (RUN + "--config {two_spellings}", ("has 'batch-size' twice",)),
    "run two places": (RUN + "--config {two_places}", ("has 'method.rank' twice",)),
    "run yaml digits": (RUN + "--config {yaml_digits}", ("--seed", "shorten it")),
    "run columns": (RUN + "--columns prompt=q", ("--columns prompt=q", "prompt and output")),
    "run no such column": (
        RUN + "--columns prompt=question,output=output",
        ("{forget} line 1: has no column 'question'", "'input', 'output'"),
    ),
    "run no yaml": (RUN + "--config {nowhere}", ("--config {nowhere}: no such file",)),
    "run yaml list": (RUN + "--config {list}", ("{list}: is not a mapping",)),
    "run method": (RUN + "--method libo", ("--method libo: unknown; did you mean libu?",)),
    "run preset": (
        RUN + "--method adaptive-rmu --preset best",
        ("--preset best", "semeval-7b, semeval-1b, original"),
    ),
    "run preset of another": (
        RUN + "--method libu --preset setup-3",
        ("libu has the presets: none; it is one of --method libu-published",),
    ),
    "run type": (RUN + "--epochs two", ("--epochs", "'two'", "expunge run --help")),
    "run yaml type": (RUN + "--config {wrong_type}", ("--epochs", "'two'")),
    "run range": (RUN + "--epochs 0", ("--epochs 0: must be 1 or more",)),
    "run choice": (RUN + "--schedule linear", ("--schedule", "'constant'", "'cosine'")),
    "run device": (RUN + "--device gpu", ("--device gpu: unknown; use auto, cpu",)),
    "run time": (RUN + "--time-limit soon", ("--time-limit soon", "90s, 20m or 1h")),
    "run required": (
        "run {model} --retain {retain} --output {new}",
        ("expunge: --forget: is missing; give rows to remove: file, directory or hub id\n",),
    ),
    "run misspelt": (
        RUN.replace("--forget", "--forgit"),
        ("--forgit: unknown; did you mean --forget?",),
    ),
    "run no value": (RUN + "--epochs", ("--epochs: needs a value",)),
    "audit required": ("audit {model}", ("--original: is missing; give the target",)),
    "compare required": ("compare", ("RUNS: is missing; give runs to compare",)),
    "run null": (RUN + "--epochs null --max-steps 0", ("--max-steps 0",)),
    "run underscore": (RUN + "--method.random_rows -1", ("--method.random-rows -1",)),
    "run taken": (RUN + "--output {taken}", ("--output {taken}: exists", "--overwrite")),
    "run overwrite": (
        RUN + "--output {taken} --overwrite",
        ("replaces earlier runs only", "holds no expunge.json", "choose another directory"),
    ),
    "run overwrite file": (
        RUN + "--output {list} --overwrite",
        ("--output {list}: is a file; choose a directory",),
    ),
    "run adapter": (RUN + "--keep-adapter", ("--keep-adapter", "leave the option out")),
    "run chat": (RUN + "--chat-template", ("--chat-template on: the tokenizer has no", "give off")),
    "run no retain": (
        "run {model} --forget {forget} --output {new} --method libu",
        ("--method libu: needs a retain set", "give --retain"),
    ),
    "evaluate same rows": (EVALUATE + "--retain {forget}", ("give two different sets",)),
    "evaluate empty": (EVALUATE + "--nonmembers {empty}", ("{empty}: is empty",)),
    "evaluate long row": (EVALUATE + "--retain {long}", ("row 'wide'", "shorten it")),
    "evaluate members": (
        EVALUATE + "--nonmembers {nonmembers} --members {nonmembers}",
        ("hold the same rows",),
    ),
    "evaluate long member": (
        EVALUATE + "--nonmembers {nonmembers} --members {long}",
        ("row 'wide'", "128"),
    ),
    "evaluate chat": (
        EVALUATE + "--chat-template on",
        ("--chat-template on: the tokenizer", "off"),
    ),
    "evaluate option": (EVALUATE + "--retan {retain}", ("--retan", "did you mean --retain?")),
    "evaluate key": (EVALUATE + "--config {evaluate_key}", ("'forgot'", "'forget'")),
    "evaluate type": (EVALUATE + "--batch-size many", ("--batch-size", "'many'")),
    "evaluate range": (EVALUATE + "--batch-size 0", ("--batch-size 0: must be 1 or more",)),
    "evaluate shots": (EVALUATE + "--mmlu-shots 5", ("--mmlu-shots: needs --mmlu",)),
    "evaluate many shots": (
        EVALUATE + "--mmlu {quiz} --mmlu-shots 5",
        ("counting_dev.csv has 2 questions; ask for no more",),
    ),
    "evaluate quiz": (EVALUATE + "--mmlu {taken}", ("{taken}: holds no test/",)),
    "evaluate reveal": (EVALUATE + "--reveal", ("--reveal", "give --records FILE")),
    "evaluate output": (EVALUATE + "--output {nowhere}", ("--output {nowhere}", "make it first")),
    "evaluate folder": (EVALUATE + "--output {taken}", ("--output {taken}", "name a file")),
    "evaluate records": (EVALUATE + "--records {nowhere}", ("--records {nowhere}",)),
    "evaluate onto rows": (
        EVALUATE + "--output {forget}",
        ("--output {forget}: is what --forget reads", "choose another place"),
    ),
    "evaluate config": (EVALUATE + "--config {taken}", ("--config {taken}: ", "name a file")),
    "audit seed": (AUDIT + "--seed -1", ("--seed -1: must be in [0, 2^32)",)),
    "audit large seed": (AUDIT + "--seed 4294967296", ("must be in [0, 2^32)",)),
    "audit rate": (
        AUDIT + "--learning-rate nan",
        ("--learning-rate nan: must be a number above 0",),
    ),
    "audit great rate": (AUDIT + "--learning-rate inf", ("--learning-rate inf",)),
    "audit onto rows": (
        AUDIT + "--output {retain}",
        ("--output {retain}: is what --retain reads", "choose another place"),
    ),
    "audit onto older rows": (
        AUDIT + "--earlier {nonmembers} --output {nonmembers}",
        ("is what --earlier {nonmembers} reads",),
    ),
    "influence onto rows": (
        "analyze influence {model} --forget {forget} --output {forget}",
        ("--output {forget}: is what --forget reads",),
    ),
    "evaluate onto weights": (
        EVALUATE + "--output {model}/model.safetensors",
        ("is there, and not written by this option",),
    ),
    "evaluate onto config": (EVALUATE + "--records {model}/config.json", ("not written by this",)),
    "evaluate twice": (
        EVALUATE + "--output {new} --records {new}",
        ("--records {new}: is what --output writes",),
    ),
    "run model twice": (RUN + "--model {new}", ("--model: is given twice, {model} stands for it",)),
    "requests list twice": (
        "requests list a --ledger=b",
        ("--ledger: is given twice, a stands for it; leave one out",),
    ),
    "audit none": (AUDIT + "--attacks ,", ("--attacks: names none; choose from direct",)),
    "run nan": (RUN + "--method.ceiling nan", ("--method.ceiling nan: must be a finite number",)),
    "run inf": (RUN + "--max-grad-norm=inf", ("--max-grad-norm inf: must be a finite number",)),
    "run random": (
        RUN + "--method.random-rows 99999999999999999999",
        ("--method.random-rows 99999999999999999999: must be 0 or more, and 1,048,576 at most",),
    ),
    "run core": (
        RUN + "--device cpu:5",
        ("--device cpu:5: unknown; this machine has cpu:0 to cpu:0",),
    ),
    "run long name": (RUN + f"--forget {'x' * 300}.jsonl", ("--forget: has a name of 306 bytes",)),
    "run alias": (RUN + "--config {alias}", ("--config {alias}: refers to itself",)),
    "run digits": (RUN + "--forget {digits}", ("{digits} line 1: holds a number of too many",)),
    "run deep": (RUN + "--forget {deep}", ("{deep} line 1: holds a number",)),
    "plan nothing": (
        "plan {model} --forget {forget} --retain {retain} --on 0GB",
        ("--on 0GB: unknown; give a size such as 24GB",),
    ),
    "demo seed": ("demo {new} --seed=-1", ("--seed -1: must be in [0, 2^32)",)),
    "demo file": ("demo {forget}", ("--output {forget}: ", "is a file")),
    "demo no methods": ("demo {new} --methods", ("--methods: is empty",)),
    "build seed": ("benchmark build {new} --seed=-1", ("--seed -1: must be in [0, 2^32)",)),
    "build below a file": ("benchmark build {forget}/x", ("{forget} is a file",)),
    "inspect nothing": ("data inspect", ("ROWS: is missing", "give the rows")),
    "inspect empty": ("data inspect {empty} --model {model}", ("{empty}: is empty",)),
    "inspect row": (INSPECT + "--row ada00sc", ("--row ada00sc", "did you mean 'ada00sc1'?")),
    "inspect option": (INSPECT + "--reveel", ("--reveel", "did you mean --reveal?")),
    "inspect key": (INSPECT + "--config {inspect_key}", ("'modl'", "'model'")),
    "inspect role": (INSPECT + "--role keep", ("--role", "'retain'")),
    "data what": ("data inspekt", ("data inspect ROWS --model MODEL",)),
    "compare nowhere": ("compare {nowhere}", ("{nowhere}: not found", "expunge evaluate")),
    "compare run": ("compare {taken}", ("{taken}/scores.json: not found", "expunge evaluate")),
    "compare other": ("compare {list}", ("{list}: is not a scores.json", "expunge evaluate")),
    "compare cell": (
        "compare {cell}",
        ("{cell}: forget Task1 regurgitation holds text", "expunge evaluate"),
    ),
    "compare both": ("compare {list} --json --markdown", ("--json: excludes --markdown",)),
    "compare option": ("compare {list} --markdwn", ("did you mean --markdown?",)),
    "compare key": ("compare {list} --config {compare_key}", ("'orakle'", "'oracle'")),
    "option first": ("--quiet evaluate {model}", ("write expunge evaluate --quiet",)),
    "command": ("evalute {model}", ("unknown command 'evalute'; did you mean evaluate?",)),
}


def snapshot(directory: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in directory.rglob("*")
    }


@pytest.fixture
def refused(
    run_cli: Cli, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs a command that must be refused in every way that a user can see; gives its line."""
    from transformers import AutoModelForCausalLM

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)

    def call(command: str) -> str:
        before = snapshot(tmp_path)
        code, out, err = run_cli(*(word.format(**places) for word in command.split()))
        assert code == 2, err
        assert out == ""
        assert err.startswith("expunge: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        assert "internal error" not in err
        assert CANARY not in err
        assert snapshot(tmp_path) == before
        return err

    return call


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_refused_in_one_line(
    case: str, refused: Callable[[str], str], places: dict[str, Path]
) -> None:
    command, words = CASES[case]
    line = refused(command)
    for word in words:
        assert word.format(**places) in line


def test_of_several_processes_the_first_says_it_and_the_others_let_it(
    run_cli: Cli, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    command = ("compare", places["nowhere"])
    monkeypatch.setenv("RANK", "0")
    code, _, err = run_cli(*command)
    assert (code, err.count("\n"), waited) == (2, 1, [])
    monkeypatch.setenv("RANK", "1")
    code, _, err = run_cli(*command)  # a scheduler's, of no launch
    assert (code, err.count("\n"), waited) == (2, 1, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_cli(*command) == (2, "", "")
    assert len(waited) == 1


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "9" * 5000])
def test_a_launch_without_numbers_is_refused(
    name: str, value: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    code, _, err = run_cli("compare", "nowhere")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{name}={value[:20]}: is no number of processes; unset the variable" in err


def test_a_process_of_its_own_ends_without_a_number_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "expunge", "compare", "nowhere"],
        env=os.environ | {"WORLD_SIZE": "abc"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("said", "count"),
    [(None, 1), ("0", 1), ("1", 1), ("3", 3), ("", 1), ("abc", 1), ("-2", 1), ("9" * 5000, 1)],
)
def test_what_a_launcher_says_is_counted_in_one_place(
    said: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if said is not None:
        monkeypatch.setenv("WORLD_SIZE", said)
    assert launched() == count
    if count == 1:
        check_alone("audit")
    else:
        assert refusal(lambda: check_alone("audit")).startswith("audit: runs in one process")


def test_a_launch_without_an_address_is_refused(
    run_cli: Cli, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, _, err = run_cli("evaluate", places["model"], "--forget", places["forget"])
    assert (code, err.count("\n")) == (2, 1)
    assert "WORLD_SIZE=2: MASTER_ADDR is not set; unset it, or start with accelerate launch" in err


def test_a_full_disk_is_told_before_the_model_is_loaded(
    refused: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, places: dict[str, Path]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    line = refused(RUN)
    assert f"--output {places['new']}: its disk has 0 MiB free" in line
    assert "choose another disk" in line


def test_debug_raises_what_happened(run_cli: Cli, places: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        run_cli("evaluate", places["nowhere"], "--forget", places["forget"], "--debug")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError(CANARY), 1, "expunge: internal error (ValueError in test_bad_input.py line"),
        (RunError("no\ncandidate"), 1, "expunge: no candidate\n"),
        (
            KeyboardInterrupt(CANARY),
            130,
            "expunge: interrupted; what was unfinished has been removed\n",
        ),
    ],
)
def test_a_failure_shows_its_place_and_never_its_text(
    error: BaseException,
    code: int,
    line: str,
    run_cli: Cli,
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("expunge.cli.data.encode_rows", fail)
    command = ("data", "inspect", places["forget"], "--model", places["model"])
    returned, out, err = run_cli(*command)
    assert (returned, out) == (code, "")
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert CANARY not in err
    with pytest.raises(type(error)):
        run_cli(*command, "--debug")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("", "evaluate"),
        ("run", "--method.momentum"),
        ("run --method adaptive-rmu", "--method.layer"),
        ("run --method libu", "--method.rank"),
        ("erase", "--dry-run"),
        ("evaluate", "--mmlu-shots"),
        ("compare", "--markdown"),
        ("data", "--reveal"),
        ("data inspect", "--reveal"),
        ("demo", "--methods"),
        ("benchmark", "--seed"),
        ("benchmark build", "--seed"),
    ],
)
def test_help_ends_with_0(command: str, word: str, run_cli: Cli) -> None:
    code, out, err = run_cli(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert word in out


def test_no_command_is_answered_with_the_help_and_2(run_cli: Cli) -> None:
    code, out, err = run_cli()
    assert (code, err) == (2, "")
    assert out.startswith("usage: expunge COMMAND")
    assert run_cli("--version")[1].startswith("expunge 0.")


def test_a_process_of_its_own_adds_no_line_of_a_library(places: dict[str, Path]) -> None:
    """Here nothing of the test suite's settings keeps the libraries quiet."""
    quiet = ("TRANSFORMERS", "HF_", "TOKENIZERS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(quiet)}
    done = subprocess.run(
        [sys.executable, "-m", "expunge", "evaluate", places["model"], "--forget", places["long"]],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("expunge: row 'wide': its prompt has")
    assert done.stderr.count("\n") == 1
    assert json.loads((places["model"] / "config.json").read_text())  # and it was left alone


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/urandom"])
def test_a_device_without_end_is_not_read(device: str, run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(device)
    for place in (device, str(tmp_path / "link")):
        for words in (["compare", place], ["run", "x", "--config", place], ["plan", f"--config={place}"],
                      ["requests", "verify-bundle", "x", "--public-key", place]):  # fmt: skip
            code, _, err = run_cli(*words)
            assert (code, err.count("\n")) == (2, 1)
            assert f"{place} is a device that never ends; name a file" in err


def test_an_empty_word_is_no_path_of_this_directory(run_cli: Cli) -> None:
    for words in (("--forget", ""), ("--forget=",), ("--method", " "), ("--preset", "")):
        code, out, err = run_cli("plan", "model", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{words[0].rstrip('=')}: is empty; give a value" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--epochs two", "--epochs 'two': takes a whole number or null"),
        ("--learning-rate x", "--learning-rate 'x': takes a number or null"),
        (
            "--method adaptive-rmu --method.layer x",
            "--method.layer 'x': takes a whole number or auto",
        ),
        ("--method libu --method.rank 1.5", "--method.rank '1.5': takes a whole number"),
    ],
)
def test_a_value_of_another_type_is_said_in_words(words: str, said: str, run_cli: Cli) -> None:
    code, _, err = run_cli("plan", "model", "--forget", "f", *words.split())
    assert (code, err) == (2, f"expunge: {said}; see expunge plan --help\n")


@pytest.mark.parametrize(("command", "option"), list(GONE))
def test_an_option_that_is_gone_says_what_does_the_same(command: str, option: str, run_cli: Cli) -> None:
    code, _, err = run_cli(*command.split(), "model", option, "value")
    assert code == 2
    assert err.startswith(f"expunge: {option}: is gone; ")
