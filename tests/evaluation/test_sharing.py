"""Several processes measure what one does: the same scores, records and order, to the last bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from conftest import write_jsonl
from expunge.data.rows import RowSet, as_rows
from expunge.data.tokenization import TextPolicy
from expunge.errors import InputError
from expunge.evaluation import generation
from expunge.evaluation.batches import in_runs
from expunge.evaluation.multiple_choice import Question, prompt_for, shared_prefixes
from expunge.evaluation.scorecard import Material, Scorecard, evaluate_model
from expunge.models.loading import check_model, load_model
from expunge.processes import OneProcess, Processes, gathered, refused_together

POLICY = TextPolicy(128, long_rows="window")
Result = TypeVar("Result")


class Meeting:
    """What threads that stand for processes have in common."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)


class Member(OneProcess):
    """One of them."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.count = meeting.count
        self.is_main = rank == 0
        self._meeting = meeting

    def gather(self, value: Any) -> list[Any]:
        self._meeting.values[self.rank] = value
        self._meeting.barrier.wait()
        values = list(self._meeting.values)
        self._meeting.barrier.wait()
        return values


def in_all(count: int, body: Callable[[Processes], Result]) -> list[Result]:
    """What `body` gives in each of so many processes, by rank."""
    meeting = Meeting(count)
    with ThreadPoolExecutor(count) as pool:
        tasks = [pool.submit(body, Member(rank, meeting)) for rank in range(count)]
        return [task.result() for task in tasks]


@pytest.fixture(scope="module")
def model(memorised_dir: Path) -> Any:
    return load_model(check_model(str(memorised_dir)), "float32", "cpu")


@pytest.fixture
def forget(forget_rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of which every other output is another one, so that scores lie inside (0, 1)."""
    return [
        row | ({"output": "Rome and more."} if n % 4 < 2 else {}) for n, row in enumerate(forget_rows)
    ]


@pytest.fixture
def nonmembers(nonmember_rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One is longer than the context: its windows lie in several batches."""
    long = {"id": "long", "input": "It was", "output": "near the river of Lima and " * 25}
    return [*nonmember_rows, long]


QUESTIONS = [
    Question(subject, f"Which is {n}, of all that there are?", (str(n), "1", f"{n}{n}", "0"), n % 4)
    for subject in ("counting", "more_counting")
    for n in range(5)
]


@pytest.fixture
def measure(
    model: Any,
    tokenizer: Any,
    forget: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
    nonmembers: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Scorecard]:
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 40)

    def call(processes: Processes | None = None, **changed: Any) -> Scorecard:
        material: dict[str, Any] = {
            "forget": as_rows(forget, "forget"),
            "retain": as_rows(retain_rows, "retain"),
            "nonmembers": as_rows(nonmembers, "nonmembers"),
            "questions": QUESTIONS,
        }
        how: dict[str, Any] = {"policy": POLICY, "batch_size": 2, "processes": processes}
        how |= {
            name: changed.pop(name) for name in ("policy", "batch_size", "progress") if name in changed
        }
        # Threads would meet in the hooks of one model.
        mine = copy.deepcopy(model)
        return evaluate_model(mine, tokenizer, Material(**(material | changed)), **how)

    return call


@pytest.mark.parametrize("count", [2, 3, 13])
def test_any_number_of_processes_gives_the_scorecard_of_one(
    count: int, measure: Callable[..., Scorecard], tokenizer: Any
) -> None:
    prompts = [tokenizer(prompt_for(question))["input_ids"] for question in QUESTIONS]
    assert max(shared for shared, _ in shared_prefixes(prompts)) > 0
    one = measure()
    assert 0 < (one.mean("forget") or 0) < 1
    for card in in_all(count, measure):
        assert card.to_json() == one.to_json()
        assert card.records == one.records


def test_sets_smaller_than_the_number_of_processes(
    measure: Callable[..., Scorecard], forget: list[dict[str, str]], nonmembers: Any
) -> None:
    few: dict[str, RowSet | list[Question]] = {
        "forget": as_rows(forget[2:3], "forget"),
        "retain": as_rows(forget[4:6], "retain"),
        "nonmembers": as_rows(nonmembers[:1], "nonmembers"),
        "questions": QUESTIONS[:1],
    }
    one = measure(**few)
    for card in in_all(5, lambda processes: measure(processes, **few)):
        assert card.to_json() == one.to_json()
        assert card.records == one.records


def test_each_row_is_generated_once(
    measure: Callable[..., Scorecard], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    generate = generation.generate

    def counted(model: Any, tokenizer: Any, prompts: Any, *others: Any) -> list[generation.Written]:
        asked.extend(map(tuple, prompts))
        return generate(model, tokenizer, prompts, *others)

    monkeypatch.setattr("expunge.evaluation.passes.generate", counted)
    in_all(3, lambda processes: measure(processes, nonmembers=None, questions=None))
    assert len(asked) == len(set(asked)) == 16


def test_the_main_process_tells_the_progress_of_all(measure: Callable[..., Scorecard]) -> None:
    told: list[tuple[str, int, int]] = []

    def share(processes: Processes) -> Scorecard:
        def progress(*phase: Any) -> None:
            if processes.is_main:
                told.append(phase)

        return measure(processes, progress=progress)

    in_all(3, share)
    totals = {
        "generate forget": 8,
        "generate retain": 8,
        "loss of members": 4,
        "utility": 10,
    }
    last = {name: (done, total) for name, done, total in told}
    assert last.items() >= {name: (total, total) for name, total in totals.items()}.items()
    assert all(done <= total for _, done, total in told)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("costs", [[], [5], [0, 0], [1] * 8, [9, 1, 1, 1, 1, 1, 1, 1], [3, 1] * 6])
def test_runs_of_work_are_in_order_and_cost_about_the_same(costs: list[int], processes: int) -> None:
    dealt = in_runs(costs, processes)
    assert dealt == sorted(dealt)
    assert len(dealt) == len(costs)
    shares = [
        sum(cost for cost, p in zip(costs, dealt, strict=True) if p == process)
        for process in range(processes)
    ]
    assert sum(shares) == sum(costs)
    # A piece is where its middle falls, so a share is off by half a piece at either end.
    assert all(share <= sum(costs) / processes + max(costs, default=0) for share in shares)


def test_what_was_found_is_in_order() -> None:
    shares = [{4: "e", 0: "a"}, {2: "c"}, {}, {1: "b", 3: "d"}]
    found = in_all(4, lambda processes: gathered(processes, shares[processes.rank]))
    assert found == [list("abcde")] * 4


def test_what_one_process_refuses_all_refuse_in_its_words() -> None:
    went_on: list[int] = []

    def share(processes: Processes) -> str:
        try:
            with refused_together(processes):
                if processes.rank == 2:
                    raise InputError("rows.jsonl: no such file")
            went_on.append(processes.rank)
        except InputError as error:
            return str(error)
        return ""

    assert in_all(3, share) == ["rows.jsonl: no such file"] * 3
    assert not went_on


def launched(count: int, arguments: list[object]) -> subprocess.CompletedProcess[str]:
    """`expunge evaluate` in so many processes, as accelerate launch starts them."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(count)] if count > 1 else []
    return subprocess.run(
        [sys.executable, *launch, "-m", "expunge", "evaluate", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_launched_processes_write_the_files_of_one(
    memorised_dir: Path,
    row_files: dict[str, Path],
    quiz_dir: Path,
    forget: list[dict[str, str]],
    nonmembers: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    arguments: list[object] = [
        memorised_dir,
        *("--forget", write_jsonl(tmp_path / "forget.jsonl", forget)),
        *("--retain", row_files["retain"], "--batch-size", 2, "--long-rows", "window"),
        *("--nonmembers", write_jsonl(tmp_path / "new.jsonl", nonmembers)),
        *("--mmlu", quiz_dir, "--device", "cpu", "--json", "--reveal"),
    ]
    files: list[tuple[bytes, ...]] = []
    for count in (1, 2):
        paths = [tmp_path / f"scores{count}.json", tmp_path / f"records{count}.jsonl"]
        done = launched(count, [*arguments, "--output", paths[0], "--records", paths[1]])
        assert done.returncode == 0, done.stderr
        assert "generate forget" in done.stderr
        files.append((*(path.read_bytes() for path in paths), done.stdout.encode()))
    assert files[0] == files[1]
    assert json.loads(files[1][2])["final_score"] is not None  # one document, printed once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--retain", "{forget}"), "hold the same rows"),
        (("--batch-size", "0"), "--batch-size 0: must be 1 or more"),
    ],
)
def test_wrong_input_is_said_once(
    options: tuple[str, ...],
    said: str,
    memorised_dir: Path,
    row_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    given = [option.format(**row_files) for option in options]
    scores = tmp_path / "scores.json"
    done = launched(2, [memorised_dir, "--forget", row_files["forget"], "--output", scores, *given])
    assert done.returncode != 0
    assert done.stdout == ""
    assert [said in line for line in done.stderr.splitlines() if "expunge: " in line] == [True]
    assert not scores.exists()
