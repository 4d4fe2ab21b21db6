"""`expunge plan`: the options and refusals of `run`, nothing read or written, nothing disclosed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import write_jsonl
from expunge.models import parts
from expunge.runs import opening

Cli = Callable[..., tuple[int, str, str]]
CANARY = "canary-4711"
PLAN = ("plan", "{model}", "--forget", "{forget}", "--retain", "{retain}", "--device", "cpu")


@pytest.fixture
def places(
    model_dir: Callable[[str], Path],
    row_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Path]:
    """A model whose tensors are a hole in a file, and rows; reading weights is an error."""
    hollow = Path(shutil.copytree(model_dir("olmo"), tmp_path / "hollow"))
    with (hollow / "model.safetensors").open("r+b") as file:
        size = hollow.joinpath("model.safetensors").stat().st_size
        file.truncate(8 + int.from_bytes(file.read(8), "little"))
        file.truncate(size)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(parts, "read_tensor", forbidden)
    # Where it is used: a module imported while the name is patched would keep what stands in for it.
    monkeypatch.setattr(opening, "load_model", forbidden)
    return {"model": hollow, **row_files}


@pytest.fixture
def plan(run_cli: Cli, places: dict[str, Path], tmp_path: Path) -> Callable[..., str]:
    """What a plan prints; it must have written nothing."""

    def call(*options: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run_cli(*(word.format(**places) for word in (*PLAN, *options)))
        assert code == 0, err
        assert err == ""
        assert sorted(tmp_path.rglob("*")) == before
        return out

    return call


def test_it_says_parts_steps_disk_and_whether_it_fits(plan: Callable[..., str]) -> None:
    out = plan("--method", "adaptive-rmu", "--epochs", "2", "--batch-size", "4")
    highest = re.search(r"in the phase '(\w+)'", out)
    assert highest is not None
    for word in ("the process itself", f"{highest[1]} *", "together", "computed"):
        assert word in out
    assert "steps:     4; 2 an epoch, 4 rows a step and side" in out
    assert "fits this machine's memory" in out
    assert "cached states" in out
    said = " ".join(out.split())
    assert re.search(r"--method.layer auto: planned for layer [23], as no layer of 2 to 3 takes", said)


def test_json_is_whole_and_agrees_with_the_options(plan: Callable[..., str]) -> None:
    found = json.loads(plan("--method", "npo", "--on", "h100-80", "--device", "auto", "--json"))
    assert found["budget"] == {
        "name": "h100-80", "bytes": int(79.1 * 2**30), "device_type": "cuda",
    }  # fmt: skip
    assert found["computed"] is found["fits"] is True
    assert found["alternatives"] == []
    assert found["method"] == "npo"
    assert found["path"] == "whole model"
    assert found["rows"]["forget"] == 8


def test_what_does_not_fit_is_no_error_and_comes_with_what_would(plan: Callable[..., str]) -> None:
    method = ("--method", "adaptive-rmu", "--method.layer", "2")
    options = (*method, "--on", "600MB", "--device", "auto")
    out = plan(*options)
    assert "does not fit 600MB" in out
    assert "with --select last: 0.7 GiB, does not fit either" in out
    found = json.loads(plan(*options, "--json"))
    assert not found["fits"]
    assert [other["fits"] for other in found["alternatives"]] == [False] * 5


def test_presets_and_yaml_are_those_of_a_run(plan: Callable[..., str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("epochs: 3\nmethod:\n  name: libu\n  rank: 2\nbatch_size: 4\n")
    found = json.loads(plan("--config", str(config), "--epochs", "1", "--json"))
    assert (found["method"], found["steps"], found["batch_size"]) == ("libu", 2, 4)
    options = ("--preset", "semeval-1b", "--method.layer", "3", "--max-steps", "5", "--json")
    found = json.loads(plan("--method", "adaptive-rmu", *options))
    assert (found["batch_size"], found["steps"], found["time_limit"]) == (8, 5, "1h")


def test_no_row_is_shown(plan: Callable[..., str], places: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"id": str(i), "input": f"{CANARY} {i}", "output": f"{i} {CANARY}"} for i in range(3)]
    places["forget"] = write_jsonl(tmp_path / "secret.jsonl", rows)
    assert CANARY not in plan()
    assert CANARY not in plan("--json")


@pytest.mark.parametrize(
    "options",
    [
        ("--epoch", "3"),
        ("--method", "adaptive-rmu", "--method.layer", "9"),
        ("--method.target", "all"),
        ("--method", "libo"),
        ("--preset", "best"),
        ("--keep-adapter",),
        ("--retain", "{forget}"),
        ("--device", "gpu"),
        ("--forget", "{model}/nowhere.jsonl"),
        ("--output", "{model}"),
    ],
    ids=" ".join,
)
def test_what_a_run_refuses_a_plan_refuses_in_the_same_words(
    run_cli: Cli, places: dict[str, Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    given = [word.format(**places) for word in (*PLAN[1:], *options)]
    output = () if "--output" in options else ("--output", str(tmp_path / "new"))
    planned, ran = run_cli("plan", *given), run_cli("run", *given, *output)
    assert planned[0] == ran[0] == 2
    assert planned[1] == ran[1] == ""
    assert planned[2].replace("expunge plan", "expunge run") == ran[2]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("on", ["h100", "lots"])
def test_an_unknown_gpu_is_refused_with_those_that_are_known(
    run_cli: Cli, places: dict[str, Path], on: str
) -> None:
    code, out, err = run_cli(*(word.format(**places) for word in PLAN[:6]), "--on", on)
    assert (code, out) == (2, "")
    assert err.startswith(f"expunge: --on {on}: unknown; ")
    assert "h100-80" in err
    assert err.count("\n") == 1


def test_help_tells_of_gpus_and_of_the_options_of_a_run(run_cli: Cli) -> None:
    code, out, _ = run_cli("plan", "--help")
    assert code == 0
    for word in ("--on", "rtx4090-24", "--json", "--method.momentum", "--micro-batch-size"):
        assert word in out


def test_shards_are_planned_for_and_checked(run_cli: Cli, plan: Callable[..., str]) -> None:
    found = json.loads(plan("--on", "h100-80", "--device", "auto", "--sharded", "8", "--json"))
    assert (found["shards"], found["method"]) == (8, "spectral")
    for wrong in ("0", "two", "-1"):
        code, _, err = run_cli("plan", "model", "--forget", "f", "--sharded", wrong)
        assert (code, err.count("--sharded")) == (2, 1)


def test_an_audit_is_planned_for_too(plan: Callable[..., str]) -> None:
    whole = json.loads(plan("--audit", "--json"))["audit"]
    assert (whole["tuning"], whole["fits"]) == ("full", True)
    assert set(whole["phases"]) == {"ask", "tune"}
    assert whole["peak_bytes"] == max(sum(parts.values()) for parts in whole["phases"].values())
    table = plan("--audit")
    assert "an audit, one model at a time" in table
    assert re.search(r"tunes: +every weight", table)
    assert "does not fit; " in plan("--audit", "--on", "1")
    assert "audit" not in json.loads(plan("--json"))


def test_an_audit_is_not_planned_without_rows_that_stay(run_cli: Cli, places: dict[str, Path]) -> None:
    options = ("--forget", places["forget"], "--method", "gradient-ascent", "--audit")
    code, _, err = run_cli("plan", places["model"], "--device", "cpu", *options)
    assert (code, err.count("\n")) == (2, 1)
    assert "give --retain" in err
