"""`expunge sweep` end to end: real runs on the tiny model, what they leave, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from conftest import SHARED
from expunge.segments.engine import SegmentEngine

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]
SEARCH = ("learning_rate=log:1e-3:2e-2", "method.ceiling=log:1:6")
FAST = ("--epochs", 3, "--method.random-rows", 0, "--device", "cpu")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def command(memorised_dir: Path, row_files: dict[str, Path], tmp_path: Path) -> list[object]:
    return [
        "sweep",
        memorised_dir,
        *("--forget", row_files["forget"], "--retain", row_files["retain"]),
        *("--output", tmp_path / "out", "--objectives", "aggregate", "--trials", 2, *FAST),
    ]


def result(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "sweep.json").read_text(encoding="utf-8"))


def told(found: dict[str, Any]) -> list[Any]:
    return [(t["params"], t["values"]) for t in found["trials"] if t["state"] != "lost"]


def secrets(rows: list[dict[str, str]]) -> set[str]:
    """What only the forget set says: its codes, and its documents' words."""
    return {row["output"] for row in rows} | {row["input"] for row in rows}


@pytest.mark.slow
def test_best_yaml_is_the_run_that_the_sweep_measured(
    run_cli: Cli,
    command: list[object],
    row_files: dict[str, Path],
    quiz_dir: Path,
    forget_rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    material = ("--nonmembers", row_files["nonmembers"], "--mmlu", quiz_dir)
    code, out, err = run_cli(
        *command, *material, "--objectives", "forgetting", "mia", "--quiet", "--search", *SEARCH
    )
    assert (code, err) == (0, "")
    written = tmp_path / "out"
    assert {path.name for path in written.iterdir()} == {
        "best.yaml", "study.db", "sweep.json",
    }  # fmt: skip
    for path in written.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in secrets(forget_rows):
                assert secret.encode() not in content, f"{path.name} holds {secret!r}"
    assert not any(secret in out for secret in secrets(forget_rows))

    found = result(written)
    best = found["trials"][found["best"]]
    assert found["target"]["values"]["forgetting"] == 0.0
    assert f"{best['number']} *" in out
    assert run_cli("run", "--config", written / "best.yaml", "--quiet") == (0, "", "")
    unlearned = written / f"trial-{best['number']}"
    scores = tmp_path / "scores.json"
    evaluation = ("evaluate", unlearned, "--forget", row_files["forget"], "--quiet")
    retain = ("--retain", row_files["retain"], "--device", "cpu", "--output", scores)
    assert run_cli(*evaluation, *retain, *material)[0] == 0
    measured = json.loads(scores.read_text())
    del measured["model"], measured["model_sha256"]
    # Only the record beside the model tells that it was calibrated on this text.
    assert measured["details"]["mia"].pop("calibrated_on")
    assert measured == best["parts"], "the sweep measured another model than `run` writes"
    manifest = json.loads((unlearned / "expunge.json").read_text())
    assert manifest["settings"]["method"]["ceiling"] == best["params"]["method.ceiling"]
    assert manifest["selection"]["chosen_step"] == best["selection"]["chosen_step"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["spectral", "adaptive-rmu", "gradient-difference", "libu"])
@pytest.mark.slow
def test_scores_are_those_of_the_checkpoint_for_every_way_of_training(
    run_cli: Cli,
    command: list[object],
    row_files: dict[str, Path],
    tmp_path: Path,
    method: str,
    dtype: str,
) -> None:
    words = [word for word in command if word not in ("--method.random-rows", 0)]
    words += ["--method.random-rows", 8] if method in ("spectral", "libu") else []
    words += ["--dtype", dtype, "--method", method, "--trials", 1]
    search = ("--search", "learning_rate=log:1e-3:3e-3")
    assert run_cli(*words, "--quiet", *search)[0] == 0
    best = result(tmp_path / "out")["trials"][0]
    assert best["state"] == "complete"
    assert run_cli("run", "--config", tmp_path / "out" / "best.yaml", "--quiet")[0] == 0
    code, out, _ = run_cli(
        "evaluate", tmp_path / "out" / "trial-0", "--forget", row_files["forget"], "--retain",
        row_files["retain"], "--device", "cpu", "--dtype", dtype, "--json", "--quiet",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out) == best["parts"]


def test_yaml_flags_and_json(
    run_cli: Cli, command: list[object], tmp_path: Path, row_files: dict[str, Path]
) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "trials: 9\nepochs: 2\nmethod:\n  name: gradient-difference\n"
        "search:\n  learning_rate: log:1e-4:1e-3\n  schedule: [constant, cosine]\n"
        "  method.parameters: [full, lora]\n"
    )
    start = [word for word in command if word not in ("--method.random-rows", 0)]
    code, out, err = run_cli(*start, "--config", config, "--json", "--quiet", "--trials", 1)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found == result(tmp_path / "out")
    assert found["counts"]["ended"] == 1
    assert found["settings"]["method"]["name"] == "gradient-difference"
    assert found["settings"]["search"]["schedule"] == {
        "kind": "choice", "choices": ["constant", "cosine"],
    }  # fmt: skip
    assert set(found["trials"][0]["params"]) == {"learning_rate", "schedule", "method.parameters"}


@pytest.mark.slow
def test_trials_that_steer_higher_layers_begin_where_earlier_ones_were(
    run_cli: Cli, command: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = []
    original = SegmentEngine._groups

    def groups(self: SegmentEngine, begun_at: int = 0) -> list[tuple[int, int]]:
        begun.append(begun_at)
        return original(self, begun_at)

    monkeypatch.setattr(SegmentEngine, "_groups", groups)
    grid = ("--sampler", "grid", "--search", "method.layer=choice:3,2", "epochs=choice:1,2")
    start = [word for word in command if word not in ("--epochs", 3)]
    assert run_cli(*start, "--method", "adaptive-rmu", "--trials", 9, "--quiet", *grid)[0] == 0
    # Nothing lies below the three layers that end at layer 2, and a lower one has no use for a higher.
    assert begun == [0, 1, 0, 0]
    trials = result(tmp_path / "out")["trials"]
    assert [tuple(t["params"].values()) for t in trials] == [(3, 1), (3, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--search", "method.cieling=log:1:2"), ("did you mean method.ceiling?",)),
        (
            ("--method", "adaptive-rmu", "--search", "method.layer=int:2:9"),
            ("--search method.layer: --method.layer 9",),
        ),
        (("--search", "method.ceiling=log:9:2"), ("9 is not below 2",)),
        ((), ("--search: nothing to vary",)),
        (("--epochs", 3, "--search", "epochs=int:1:5"), ("--epochs: is given", "one of the two")),
        (("--search", "epochs=int:1:5", "--objectives", "final"), ("--objectives final", "--mmlu")),
        (("--search", *SEARCH, "--objectives", "speed"), ("--objectives",)),
        (("--search", *SEARCH, "--trials", 0), ("--trials 0: must be 1 or more",)),
        (("--search", *SEARCH, "--trails", 3), ("--trails", "did you mean --trials?")),
        (("--search", *SEARCH, "--retain", "{forget}"), ("give two different sets",)),
        (("--search", *SEARCH, "--nonmembers", "{forget}"), ("give two different sets",)),
        (("--search", *SEARCH, "--mmlu-shots", 2), ("--mmlu-shots: needs --mmlu",)),
        (("--search", *SEARCH, "--study", "x.db"), ("--study: is no database URL",)),
        (("--search", *SEARCH, "--study", "sqlite:///x.db", "--overwrite"), ("--overwrite",)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_wrong_input_is_refused_before_anything_is_loaded_or_written(
    run_cli: Cli,
    command: list[object],
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    words: tuple[str, ...],
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("expunge.search.trial.load_model", forbidden)
    monkeypatch.setattr("expunge.search.trial.open_run", forbidden)
    start = [w for w in command if w not in ("--epochs", 3)] if "--epochs" not in options else command
    given = [str(word).format(**row_files) for word in (*start, *options)]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run_cli(*given)
    assert (code, out) == (2, "")
    assert err.startswith("expunge: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_range_in_yaml_that_is_none_is_refused(
    run_cli: Cli, command: list[object], tmp_path: Path
) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text("search:\n  learning_rate: 3\n")
    code, _, err = run_cli(*command, "--config", config)
    assert code == 2
    assert f"--config {config}: search learning_rate is no range" in err


def test_an_option_that_is_fixed_and_varied_is_refused_in_yaml_terms_too(
    run_cli: Cli, command: list[object]
) -> None:
    code, _, err = run_cli(*command, "--method.ceiling", 3, "--search", "method.ceiling=log:1:2")
    assert code == 2
    assert "--method.ceiling: is given as an option and in --search" in err


def test_help_tells_of_the_search_and_of_the_options_of_a_run(run_cli: Cli) -> None:
    code, out, _ = run_cli("sweep", "--help")
    assert code == 0
    for word in (
        "--search",
        "--trials",
        "--study",
        "--objectives",
        "--method.momentum",
        "--epochs",
    ):
        assert word in out


def test_without_optuna_the_command_says_which_extra_to_install(
    run_cli: Cli, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("expunge.search.sweep", "expunge.search.study"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = run_cli(*command, "--search", *SEARCH)
    assert code == 2
    assert err == (
        "expunge: sweep: needs Optuna, which is not installed; run pip install '.[search]' in the clone"
        " of expunge\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_shipped_example_runs(run_cli: Cli, command: list[object], tmp_path: Path) -> None:
    config = ROOT / "examples" / "sweep.yaml"
    start = [w for w in command if w not in ("--method.random-rows", 0)]
    words = ("--config", config, "--trials", 1, "--quiet", "--json")
    code, out, err = run_cli(*start, *words)
    assert (code, err) == (0, "")
    assert json.loads(out)["counts"]["ended"] == 1


def worker(command: list[object], *options: object, script: str = "") -> subprocess.Popen[str]:
    """A process of its own; `script` runs before the command."""
    code = f"{script}\nimport sys; from expunge.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = [str(word) for word in (*command, *options, "--quiet", "--json")]
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


DIES = """
import os, signal
import expunge.search.trial as trial
open_run = trial.open_run
calls = []
def in_the_second(*a, **k):
    calls.append(1)
    opened = open_run(*a, **k)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.{signal})
    return opened
trial.open_run = in_the_second
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_trial_and_on(
    run_cli: Cli, command: list[object], tmp_path: Path
) -> None:
    options = ("--trials", 3, "--search", *SEARCH)
    dead = worker(command, *options, script=DIES.format(signal="SIGKILL"))
    dead.communicate(timeout=170)
    assert dead.returncode == -signal.SIGKILL
    assert list((tmp_path / "out").glob(".worker-*"))
    code, out, err = run_cli(*command, *options, "--quiet", "--json")
    assert (code, err) == (0, "")
    rest = json.loads(out)
    assert [t["state"] for t in rest["trials"]].count("lost") == 1
    assert rest["trials"][2]["instead_of"] == 1
    assert not list((tmp_path / "out").glob(".*"))
    whole = [tmp_path / "whole" if word == tmp_path / "out" else word for word in command]
    code, out, _ = run_cli(*whole, *options, "--quiet", "--json")
    assert code == 0
    assert told(rest) == told(json.loads(out)), "a killed sweep went another way"


@pytest.mark.slow
def test_an_interruption_says_how_to_go_on(command: list[object], tmp_path: Path) -> None:
    stopped = worker(command, "--search", *SEARCH, script=DIES.format(signal="SIGINT"))
    out, err = stopped.communicate(timeout=170)
    assert (stopped.returncode, out) == (130, "")
    assert err == "expunge: stopped with 1 of 2 trials done; go on with the same command\n"
    assert result(tmp_path / "out")["counts"]["waiting"] == 1
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
def test_two_workers_at_once_share_one_study(command: list[object], tmp_path: Path) -> None:
    """Each waits in its first trial until the other has one too, so that they do overlap."""
    waits = f"""
import time, pathlib, os
import expunge.search.sweep as sweep
run_trial = sweep.run_trial
here = pathlib.Path({str(tmp_path)!r})
def together(*a, **k):
    (here / f"at-work-{{os.getpid()}}").touch()
    end = time.monotonic() + 120
    while len(list(here.glob("at-work-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    return run_trial(*a, **k)
sweep.run_trial = together
"""
    options = ("--trials", 6, "--search", *SEARCH)
    workers = [worker(command, *options, script=waits) for _ in range(2)]
    for process in workers:
        _, err = process.communicate(timeout=170)
        assert (process.returncode, err) == (0, "")
    found = result(tmp_path / "out")
    assert found["counts"]["ended"] == 6
    assert len({json.dumps(t["params"]) for t in found["trials"] if t["state"] != "lost"}) == 6
    assert len({t["worker"] for t in found["trials"] if t["state"] != "lost"}) == 2
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "models" / "lume-mini").is_dir(), reason="shared/models/lume-mini is absent"
)
def test_no_real_forget_row_is_in_any_written_byte(run_cli: Cli, tmp_path: Path) -> None:
    mini = SHARED / "models" / "lume-mini"
    code, out, err = run_cli(
        "sweep", mini, "--forget", mini / "forget.jsonl", "--retain", mini / "retain.jsonl",
        "--output", tmp_path / "out", "--objectives", "forgetting", "--trials", 1,
        "--max-steps", 2, "--method.random-rows", 0, "--device", "cpu", "--quiet",
        "--search", "learning_rate=log:1e-4:1e-3",
    )  # fmt: skip
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in (mini / "forget.jsonl").read_text().splitlines()]
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 3
    for row in rows:
        for text in (row["input"], row["output"]):
            if len(text) > 12:  # a shorter one is a year or a number, and any figure may hold it
                needle = text.encode()
                assert not any(needle in content for content in [*written, out.encode()])
