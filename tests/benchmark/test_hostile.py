"""benchmarks/hostile.py: its faults are the seed's, its checks find what is wrong, its table counts."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from conftest import load_benchmark


@pytest.fixture(scope="module")
def hostile() -> ModuleType:
    return load_benchmark("hostile")


def test_what_is_done_to_an_input_is_the_seeds(hostile: ModuleType) -> None:
    tree = {"a": [1, {"b": "x"}], "c": None}
    done = [hostile.bent(random.Random(n), tree)[1] for n in range(40)]
    assert done == [hostile.bent(random.Random(n), tree)[1] for n in range(40)]
    assert len(set(done)) > 20
    assert tree == {"a": [1, {"b": "x"}], "c": None}
    content = json.dumps(tree).encode()
    for number in range(60):
        found, told = hostile.damaged(random.Random(number), content)
        assert (found, told) == hostile.damaged(random.Random(number), content)
    assert hostile.as_json(["@digits@"]) == b"[" + b"9" * 6000 + b"]"


@pytest.mark.parametrize(
    ("code", "out", "err", "fault"),
    [
        (2, "", "expunge: x: is empty; give a file\n", ""),
        (0, "scores", "loading\n", ""),
        (2, "", "", "0 lines say what is wrong"),
        (2, "", "loading\nexpunge: x\n", "more than the one line"),
        (1, "", "expunge: x\n", "exit code 1"),
        (1, "", "expunge: internal error (KeyError in x.py line 1)\n", "internal error"),
        (2, "", "Traceback (most recent call last)\n", "traceback"),
        (2, "", "expunge: \x1b[2J\n", "control characters"),
        (2, "", "expunge: row 'zebrafish forget0'\n", "text of a row"),
    ],
)
def test_a_fault_has_a_name(code: int, out: str, err: str, fault: str, hostile: ModuleType) -> None:
    case = hostile.Case("rows", ["evaluate"], "")
    assert hostile._fault_of(case, code, out, err) == fault


def test_the_table_counts_each_input_once(hostile: ModuleType) -> None:
    counts = Counter({("rows", "refused"): 3, ("rows", "fault"): 1, ("models", "right"): 2})
    lines = hostile.table_of(counts, 6, 0).splitlines()
    assert lines[0] == "`python benchmarks/hostile.py --inputs 6 --seed 0`:"
    assert lines[4:] == [
        "| models | 2 | 0 | 2 | 0 | 0 |", "| rows | 4 | 3 | 0 | 0 | 1 |",
        "| all | 6 | 3 | 2 | 0 | 1 |",
    ]  # fmt: skip


@pytest.mark.slow
def test_some_of_them_are_refused_or_right(hostile: ModuleType, tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        inputs=40, seed=0, only=None, kinds=["evidence", "options"], seconds=120, keep=None
    )
    counts, faults = hostile.trial(arguments, tmp_path)
    assert (sum(counts.values()), faults) == (40, 0)
