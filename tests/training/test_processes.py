"""Two processes give what one gives: gradients, candidates and the written weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import exact_muon
from expunge.cli.main import main
from expunge.errors import InputError
from expunge.processes import ManyProcesses, OneProcess
from expunge.runs.scratch import shared_scratch

TOLERANCE = 1e-4
"""Of the change of each tensor: float32 sums in another order, carried through the optimiser."""
MUON_TOLERANCE = 1e-3
"""Its five iterations enlarge what is small in a gradient, and so its rounding, up to 3.4^5 times."""


CASES = (
    ("spectral", False),
    ("adaptive-rmu", False),
    ("libu", False),
    ("libu-published", False),
    ("npo", False),
    ("npo", True),
    ("alt-po", False),
    ("idk-dpo", True),
    ("jensun", False),
    ("undial", True),
    ("libu", True),
    ("libu-published", True),
    ("npo-merging", True),
    ("chunked-gradient-difference", False),
    ("localized-gradient-difference", False),
    ("rep-select", False),
)
"""Methods, and whether their weights are spread over the processes."""
SHARDED = {"ACCELERATE_USE_FSDP": "true"}
UNDIVIDED = "undivided"
RANDOM = ("--method.random-rows", 8)
Launch = subprocess.CompletedProcess[str]


def two(*commands: list[object], **variables: str) -> Launch:
    """`expunge run` in two processes, as accelerate launch starts them, one command after another."""
    words: list[object] = []
    for command in commands:
        words += [exact_muon.THEN, "run", *command] if words else ["run", *command]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    try:
        return subprocess.run(
            [*launch, exact_muon.__file__, *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            capture_output=True,
            text=True,
            timeout=300 * len(commands),
        )
    except subprocess.TimeoutExpired as late:  # once for all tests of the series
        return subprocess.CompletedProcess(late.cmd, 1, "", str(late))


@pytest.fixture(scope="module")
def arguments(memorised_dir: Path, row_files: dict[str, Path]) -> list[object]:
    return [
        memorised_dir,
        *("--forget", row_files["forget"], "--retain", row_files["retain"]),
        *("--nonmembers", row_files["nonmembers"], "--learning-rate", 1e-3, "--device", "cpu"),
        *("--batch-size", 3, "--epochs", 3, "--quiet"),
    ]


@pytest.fixture(scope="module")
def one(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """What this process gives for the same words; made once."""
    made: dict[tuple[str, ...], Path] = {}

    def call(*options: object) -> Path:
        words = tuple(map(str, options))
        if words not in made:
            output = tmp_path_factory.mktemp("one") / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exact_muon.PRODUCTS, torch.float64)
                assert main(["run", *map(str, arguments), *words, "--output", str(output)]) == 0
            made[words] = output
        return made[words]

    return call


def options_of(method: str) -> tuple[object, ...]:
    return ("--method", method, *(RANDOM if method in ("spectral", "libu") else ()))


@pytest.fixture(scope="module")
def of_two(
    arguments: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], tuple[Path, Launch]]:
    """Where two processes wrote what every method gives: one start for the sharded, one for the rest."""
    made: dict[bool, tuple[Path, Launch]] = {}

    def call(sharded: bool) -> tuple[Path, Launch]:
        if sharded not in made:
            directory = tmp_path_factory.mktemp("two")
            commands = [
                [*arguments, *options_of(method), "--output", directory / method]
                for method, spread in CASES
                if spread == sharded
            ]
            if sharded:
                undivided = ("--batch-size", 1, "--max-steps", 2, "--micro-batch-size", 1)
                output = ("--output", directory / UNDIVIDED)
                commands.append([*arguments, *options_of("spectral"), *undivided, *output])
            made[sharded] = directory, two(*commands, **(SHARDED if sharded else {}))
        return made[sharded]

    return call


def assert_same(one: Path, two: Path, target: Path, tolerance: float) -> None:
    """The same changes and the same measures, to the stated tolerance."""
    before, a, b = (load_file(path / "model.safetensors") for path in (target, one, two))
    changed = [name for name in before if not torch.equal(before[name], a[name])]
    assert changed
    for name in before:
        difference = (a[name] - b[name]).norm()
        assert difference <= tolerance * (a[name] - before[name]).norm(), name

    def metrics(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]

    for mine, others in zip(metrics(one), metrics(two), strict=True):
        assert mine.keys() == others.keys()
        for key in ("loss", "forget", "retain", "score"):
            if mine.get(key) is not None:
                # A harmonic mean of which one part is near 0 enlarges what is rounding.
                least = 1e-4 if key == "score" else 1e-5
                assert others[key] == pytest.approx(mine[key], rel=1e-3, abs=least), key


@pytest.mark.slow
@pytest.mark.parametrize(("method", "sharded"), CASES)
def test_two_processes_give_the_result_of_one(
    method: str,
    sharded: bool,
    one: Callable[..., Path],
    of_two: Callable[[bool], tuple[Path, Launch]],
    memorised_dir: Path,
) -> None:
    directory, done = of_two(sharded)
    assert done.returncode == 0, done.stderr
    assert json.loads((directory / method / "expunge.json").read_text())["processes"] == 2
    tolerance = MUON_TOLERANCE if method in ("spectral", "libu") else TOLERANCE
    assert_same(one(*options_of(method)), directory / method, memorised_dir, tolerance)
    assert not list(directory.glob(".*"))


@pytest.mark.slow
def test_full_weights_are_sharded_and_a_stopped_run_goes_on(
    arguments: list[object], one: Callable[..., Path], tmp_path: Path, memorised_dir: Path
) -> None:
    fewer = ("--method.gradient-checkpointing", "--micro-batch-size", 1)
    options = (*options_of("spectral"), *fewer)
    command = [*arguments, *options, "--output", tmp_path / "two"]
    stopped = two(command, STOP_AT="5", **SHARDED)
    assert "step 5 is saved" in stopped.stderr, stopped.stderr
    saved = load_file(tmp_path / ".two.unfinished" / "state" / "state.safetensors")
    kinds = {name.partition(".")[0] for name in saved}
    assert {"parameters", "optimizer", "best"} <= kinds
    done = two([*command, "--resume"], **SHARDED)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "two" / "expunge.json").read_text())
    assert (manifest["processes"], manifest["resumed_from_steps"]) == (2, [5])
    assert_same(one(*options), tmp_path / "two", memorised_dir, MUON_TOLERANCE)


@pytest.mark.slow
def test_sharded_processes_make_as_many_passes_over_rows_that_do_not_divide(
    of_two: Callable[[bool], tuple[Path, Launch]],
) -> None:
    """Three never-seen rows, one a pass: two for one process and one for the other."""
    directory, done = of_two(True)
    assert done.returncode == 0, done.stderr
    assert json.loads((directory / UNDIVIDED / "expunge.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_wrong_input_is_said_once_and_ends_all_processes(
    arguments: list[object], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = two([*arguments, "--output", tmp_path / "out"])
    assert done.returncode != 0
    assert done.stderr.count("expunge: --output") == 1
    assert "exists" in done.stderr


def test_full_weights_of_which_a_method_needs_those_from_before_are_not_sharded(
    arguments: list[object],
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OneProcess, "shards", True)
    method = ("--method", "gradient-difference", "--method.parameters", "full")
    code, _, err = run_cli("run", *arguments, *method, "--output", tmp_path / "out")
    assert code == 2
    assert "cannot be sharded" in err
    assert list(tmp_path.iterdir()) == []


class Second(OneProcess):
    """The second of two processes, told what the first said."""

    rank = 1
    count = 2
    is_main = False

    def __init__(self, said: object) -> None:
        self._said = said

    def gather(self, value: Any) -> list[Any]:
        return [self._said, value]


def test_the_others_hear_why_the_first_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="an unfinished run is beside it"),
        shared_scratch(
            Second("an unfinished run is beside it"),
            tmp_path / "out",
            {},
            resume=False,
            overwrite=False,
        ),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_process_is_all_there_is_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.processes import processes_of

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = processes_of("cpu")
    assert isinstance(alone, OneProcess)
    assert not isinstance(alone, ManyProcesses)
    tensor = torch.ones(2)
    alone.sum([tensor])
    assert alone.gather(3) == [3]
    assert torch.equal(tensor, torch.ones(2))


def test_a_process_of_several_ends_at_once_and_says_all_it_had_to_say() -> None:
    """Python's finalisation, which gloo's threads abort now and then, is not run."""
    script = (
        "import atexit, sys; atexit.register(print, 'finalised');"
        "from expunge.cli.main import entry; sys.argv = ['expunge', *sys.argv[1:]]; entry()"
    )

    def end(arguments: list[str], count: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=os.environ | {"WORLD_SIZE": count},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    alone = end(["--version"], "1")[1]
    assert end(["--version"], "2") == (0, alone.removesuffix("finalised\n"), "")
    assert "finalised" in alone
    code, out, err = end(["nonsense"], "2")
    assert (code, out) == (2, "")
    assert "unknown command" in err
