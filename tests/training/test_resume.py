"""A run that was stopped, killed or out of disk is continued to the bytes of one that was not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import mostly_slow
from expunge.cli.main import main
from expunge.runs import keeping
from expunge.runs.scratch import Scratch
from expunge.training import state
from expunge.training.loop import Loop
from expunge.training.muon import Muon
from expunge.training.state import load_state, optimizer_tensors, restore_optimizer, save_state

Cli = Callable[..., tuple[int, str, str]]
Run = Callable[..., tuple[int, str, str]]
LAST = 9
"""Three epochs of three steps."""
METHODS = ("spectral", "adaptive-rmu", "libu", "npo")
BASELINES = (
    "libu-published",
    "token-npo",
    "npo-merging",
    "chunked-gradient-difference",
    "localized-gradient-difference",
    "rep-select",
    "retrain --base",
    "spectral --base",
    "spectral alone",
    "spectral answering",
)
DROPOUT = ("--method.lora_dropout", 0.3)
RANDOM = ("--method.random-rows", 8)
OWN = {
    "spectral": RANDOM,
    "spectral --base": RANDOM,
    "spectral alone": RANDOM,
    "spectral answering": (*RANDOM, "--method.answer-instead", "Nobody knows that."),
    "adaptive-rmu": (),
    "rep-select": ("--learning-rate", 1),
    "libu": (*RANDOM, *DROPOUT),
}


@pytest.fixture(scope="module")
def arguments(memorised_dir: Path, row_files: dict[str, Path]) -> list[object]:
    return [
        "run",
        memorised_dir,
        *("--forget", row_files["forget"], "--retain", row_files["retain"]),
        *("--nonmembers", row_files["nonmembers"], "--learning-rate", 1e-3),
        *("--batch-size", 3, "--epochs", 3, "--save-every", 3, "--quiet"),
        *("--method", "adaptive-rmu"),  # which has the most to keep
    ]


@pytest.fixture
def start(arguments: list[object], run_cli: Cli) -> Run:
    def call(output: Path, *options: object) -> tuple[int, str, str]:
        return run_cli(*arguments, "--output", output, *options)

    return call


@pytest.fixture(scope="module")
def whole(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The output of the same run that nothing stopped; made once, and only read."""
    made: dict[tuple[str, ...], Path] = {}

    def call(*options: object) -> Path:
        words = tuple(map(str, options))
        if words not in made:
            output = tmp_path_factory.mktemp("whole") / "out"
            assert main([*map(str, arguments), "--output", str(output), *words]) == 0
            made[words] = output
        return made[words]

    return call


def scratch_of(output: Path) -> Path:
    return output.parent / f".{output.name}.unfinished"


def result(output: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The final weights, and the metrics without their times."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return (output / "model.safetensors").read_bytes(), lines


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Sends this process the signal in the middle of a step."""
    original = Loop._step

    def stepping(self: Loop, current: int, started: float) -> str | None:
        if current == step:
            os.kill(os.getpid(), number)
        return original(self, current, started)

    monkeypatch.setattr(Loop, "_step", stepping)


@pytest.mark.parametrize(
    ("method", "step"),
    mostly_slow(
        [(method, step) for method in METHODS for step in (1, 5, LAST)]
        + [(method, 5) for method in BASELINES],
        ("spectral", 5),
        ("adaptive-rmu", 5),
        ("adaptive-rmu", LAST),
    ),
)
def test_an_interrupted_run_continues_to_the_same_bytes(
    method: str,
    step: int,
    start: Run,
    whole: Callable[..., Path],
    model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, _, yardstick = method.partition(" ")
    options: list[object] = ["--method", name, *OWN.get(method, DROPOUT)]
    if yardstick:
        options += ["--calibration", "None"]
        options += [yardstick, model_dir()] if yardstick == "--base" else []
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        code, _, err = start(out, *options)
    if step < LAST:  # at the last step there is nothing left to stop
        assert code == 130
        assert err.count("\n") == 1
        assert f"stopped after step {step} of {LAST}" in err
        assert f"step {step} is saved" in err
        assert "--resume" in err
        assert not out.exists()
        assert start(out, *options, "--resume") == (0, "", "")
        manifest = json.loads((out / "expunge.json").read_text())
        assert manifest["resumed_from_steps"] == [step]
    assert result(out) == result(whole(*options))
    assert not scratch_of(out).exists()


@pytest.mark.slow
def test_sigterm_saves_as_well_and_many_interruptions_add_up(
    start: Run, whole: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for step in (2, 3, 7):
        with monkeypatch.context() as patch:
            interrupt_at(step, patch, signal.SIGTERM)
            assert start(out, "--resume")[0] == 143
    assert start(out, "--resume")[0] == 0
    assert result(out) == result(whole())
    manifest = json.loads((out / "expunge.json").read_text())
    assert manifest["resumed_from_steps"] == [2, 3, 7]
    code, _, _ = start(out, "--resume")
    assert code == 0  # complete already
    assert result(out) == result(whole())


@pytest.mark.slow
def test_an_unfinished_run_is_neither_overwritten_nor_mixed(
    start: Run, whole: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        start(out)
    code, _, err = start(out)
    assert code == 2
    assert f"an unfinished run is beside it (step 5 of {LAST} is saved)" in err
    code, _, err = start(out, "--resume", "--seed", 1)
    assert code == 2
    assert "training.seed 0, this one has 1" in err
    code, _, err = start(out, "--resume", "--method.beta", 3)
    assert code == 2
    assert "method.beta 5.0, this one has 3.0" in err
    asked = scratch_of(out) / "run.json"
    asked.write_text(json.dumps(json.loads(asked.read_text()) | {"format": 1}))
    code, _, err = start(out, "--resume")
    assert code == 2
    assert "of another version of expunge" in err
    assert start(out, "--overwrite", "--seed", 1)[0] == 0
    assert result(out) == result(whole("--seed", 1))


def test_what_is_kept_of_an_interrupted_run_holds_no_forget_text(
    start: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forget_rows: list[dict[str, str]],
) -> None:
    interrupt_at(5, monkeypatch)
    _, out, err = start(tmp_path / "out")
    secrets = [row[column] for row in forget_rows for column in ("input", "output")]
    scratch = scratch_of(tmp_path / "out")
    assert scratch.stat().st_mode & 0o077 == 0
    files = [path for path in scratch.rglob("*") if path.is_file()]
    assert {"below", "targets", "state.safetensors", "run.json"} <= {path.name for path in files}
    for path in files:
        if path.name == "tokenizer.json":
            continue
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path.name
    assert not any(secret in out + err for secret in secrets)


@pytest.mark.parametrize(
    "where", mostly_slow(["write_checkpoint", "verify_checkpoint"], "write_checkpoint")
)
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError("secret"), MemoryError("secret")])
def test_a_fault_while_writing_keeps_what_was_there_and_the_state(
    where: str,
    fault: BaseException,
    start: Run,
    whole: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from expunge.runs import run

    out = Path(shutil.copytree(whole("--seed", 1), tmp_path / "out"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_: object, **__: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(run, where, fail)
        code, _, err = start(out, "--overwrite")
    assert code == (130 if isinstance(fault, KeyboardInterrupt) else 1)
    assert err.count("\n") == 1
    assert "secret" not in err
    assert f"step {LAST} is saved: go on with the same command and --resume" in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert start(out, "--overwrite", "--resume")[0] == 0
    assert result(out) == result(whole())


def test_a_full_disk_is_one_line_and_the_last_state_stays(
    start: Run, whole: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original = state.save_state

    def full(directory: Path, facts: Any, groups: Any) -> None:
        if facts["step"] >= 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(directory))
        original(directory, facts, groups)

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "save_state", full)
        code, _, err = start(out)
    assert code == 1
    assert err.count("\n") == 1
    assert "No space left on device" in err
    assert "step 3 is saved" in err
    assert start(out, "--resume")[0] == 0
    assert result(out) == result(whole())


def test_a_state_that_could_not_be_written_leaves_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, {"step": 1}, {"parameters": {"w": torch.ones(3)}})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_state(tmp_path, {"step": 2}, {"parameters": {"w": torch.zeros(3)}})
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    saved = load_state(tmp_path)
    assert saved is not None
    assert saved.facts == {"step": 1}
    assert torch.equal(saved.under("parameters")["w"], torch.ones(3))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Muon])
def test_an_optimizer_comes_back_as_it_was(kind: Callable[..., torch.optim.Optimizer]) -> None:
    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(0, 1, 6).reshape(2, 3))
        return parameter, kind([parameter], lr=0.1)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, first = made()
    for _ in range(3):
        step(one, first)
    other, second = made()
    other.data.copy_(one.data)
    restore_optimizer(second, {k: v.clone() for k, v in optimizer_tensors(first).items()})
    for _ in range(3):
        step(one, first)
        step(other, second)
    assert torch.equal(one, other)


def test_two_processes_do_not_work_on_one_output(
    start: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    out = tmp_path / "out"
    scratch_of(out).mkdir()
    with (scratch_of(out) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = start(out, "--resume")
    assert code == 2
    assert "another process is at work on it" in err
    assert not out.exists()


def test_a_kill_between_the_two_renames_loses_nothing(
    start: Run, whole: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old output was put aside, the new one not yet in its place."""
    out = Path(shutil.copytree(whole("--seed", 1), tmp_path / "out"))
    before = result(out)
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        start(out, "--overwrite")
    out.rename(scratch_of(out) / "replaced")
    assert start(out)[0] == 2  # says what is there and touches nothing
    code, _, err = start(out, "--resume")
    assert code == 2
    assert "exists" in err  # the old one is back, and in the way
    assert result(out) == before
    assert start(out, "--resume", "--overwrite")[0] == 0
    assert result(out) == result(whole())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spectral", "adaptive-rmu", "libu"])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    method: str, arguments: list[object], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGKILL as soon as the run has begun, has its cache, and three times has saved another state."""
    options = ("--method", method, *map(str, OWN[method]), "--epochs", "40", "--save-every", "2")
    command = [sys.executable, "-m", "expunge", *map(str, arguments), *options]
    # As many threads as `whole` has, whose sums are to be the same.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    out = tmp_path / "out"
    scratch = Scratch(out)

    def start_again() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--output", str(out), "--resume"], env=environment, stderr=subprocess.PIPE
        )

    def saved_step() -> int:
        facts = scratch.facts()
        return -1 if facts is None else int(facts["step"])

    reached: list[Callable[[int], bool]] = [
        lambda _: scratch.root.exists(),
        lambda _: scratch.worth_resuming,
        *[lambda before: saved_step() > before] * 3,
    ]
    for is_reached in reached:
        before = saved_step()
        process = start_again()
        while not is_reached(before):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start_again()
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert result(out) == result(whole(*options))
    assert not scratch_of(out).exists()
