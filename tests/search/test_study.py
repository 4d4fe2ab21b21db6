"""A study's bookkeeping, on trials whose scorecard is a formula: fast, and exact."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from sqlalchemy import event
from sqlalchemy.engine import Engine

from conftest import refusal
from expunge.errors import Interrupted, RunError
from expunge.evaluation.scorecard import Scorecard
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.search import study as studies
from expunge.search import sweep as module
from expunge.search.inputs import SweepInputs
from expunge.search.sweep import sweep
from expunge.search.trial import TrialResult
from expunge.training.options import TrainingOptions

CANARY = "canary-4711"
WORDS = ("method.alpha=log:5:100", "learning_rate=log:1e-3:1e-1", "schedule=choice:constant,cosine")


def card(forgot: float, kept: float) -> Scorecard:
    aggregate = 2 * forgot * kept / (forgot + kept)
    return Scorecard(
        {"A": {"knowledge": 1 - forgot}},
        {"A": {"knowledge": kept}},
        aggregate,
        0.5,
        1.0,
        None,
        None,
    )


class FakeTrials:
    """Stands in for `run_trial`; `events` happen in place of the trial of that turn."""

    def __init__(self) -> None:
        self.turn = 0
        self.events: dict[int, Callable[[], object]] = {}
        self.validations = True

    def __call__(
        self, task: Any, method: Any, options: Any, directory: Path, watch: Any, *_: object
    ) -> TrialResult:
        self.turn += 1
        if self.turn in self.events:
            self.events[self.turn]()
        # A ridge in alpha and the learning rate, the better the higher.
        rate = options.learning_rate or 0.01
        forgot = 1 / (1 + abs(method.alpha - 30) / 30)
        kept = 1 / (1 + 20 * rate)
        seen = watch(5)
        for step in range(1, 6):
            seen(
                {
                    "step": step,
                    "validation": {},
                    "score": forgot * kept * step / 5,
                    "destroyed": rate > 0.03,
                }
            )
        return TrialResult(card(forgot, kept), {"chosen_step": 10}, [], {"run": 0.1})


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> FakeTrials:
    fake = FakeTrials()
    monkeypatch.setattr(module, "run_trial", fake)
    monkeypatch.setattr(module, "score", lambda *_: card(0.01, 1.0))
    return fake


@pytest.fixture(autouse=True, scope="module")
def not_to_the_disk() -> Iterator[None]:
    """SQLite waits 10 ms for the disk at each of 30 commits a trial; no test here pulls the plug."""

    def set_pragma(connection: Any, _record: object) -> None:
        connection.execute("pragma synchronous = off")

    event.listen(Engine, "connect", set_pragma)
    yield
    event.remove(Engine, "connect", set_pragma)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def start(
    model_dir: Callable[[str], Path], row_files: dict[str, Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    def call(output: str = "out", **changes: Any) -> dict[str, Any]:
        seed = changes.pop("seed", 0)
        options = changes.pop("options", {})
        values: dict[str, Any] = {
            "model": str(model_dir("olmo")),
            "forget": str(row_files["forget"]),
            "retain": str(row_files["retain"]),
            "output": str(tmp_path / output),
            "search": WORDS,
            "objectives": ("aggregate",),
            "trials": 6,
            "device": "cpu",
        } | changes
        return sweep(SweepInputs(**values), AdaptiveRMU(), TrainingOptions(seed=seed, **options))

    return call


WHOLE: list[Any] = []
"""What a sweep of 12 trials tells, beyond the 10 that are drawn at random; of all tests the same."""


def uninterrupted(start: Any) -> list[Any]:
    if not WHOLE:
        WHOLE.extend(told(start("whole", trials=12)))
    return WHOLE


def told(result: dict[str, Any]) -> list[Any]:
    """What must not depend on interruptions: settings and values, in order, of what counts."""
    kept = [t for t in result["trials"] if t["state"] != "lost"]
    return [(t["state"], t["params"], t["values"], t["intermediate"]) for t in kept]


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(
    start: Any, trials: FakeTrials
) -> None:
    first = uninterrupted(start)
    assert first == told(start("b", trials=12))
    assert first[0] != told(start("c", trials=1, seed=1))[0]
    assert len({json.dumps(params) for _, params, _, _ in first}) == 12


def test_a_sweep_in_pieces_is_the_sweep_at_once(start: Any, trials: FakeTrials) -> None:
    whole = uninterrupted(start)
    for count in (1, 5, 11, 12):
        pieces = start("b", trials=count)
        assert pieces["counts"]["ended"] == count
    assert told(pieces) == whole
    again = trials.turn
    assert told(start("b", trials=12)) == whole
    assert trials.turn == again, "a complete sweep has nothing to do"


def test_a_grid_is_gone_through_once_and_in_order(start: Any, trials: FakeTrials) -> None:
    words = ("schedule=choice:constant,cosine", "method.layer=int:2:3", "method.beta=float:1:2:0.5")
    pieces = start("b", trials=5, search=words, sampler="grid")
    result = start("b", trials=99, search=words, sampler="grid")
    assert result["counts"]["asked"] == result["counts"]["ended"] == trials.turn == 12
    assert pieces["trials"][:5] == result["trials"][:5]
    points = [tuple(trial["params"].values()) for trial in result["trials"]]
    assert points == [
        (schedule, layer, beta)
        for schedule in ("constant", "cosine")
        for layer in (2, 3)
        for beta in (1.0, 1.5, 2.0)
    ]
    assert "method.alpha has no steps" in refusal(lambda: start("c", sampler="grid"))


@pytest.mark.slow
def test_the_search_learns(start: Any, trials: FakeTrials) -> None:
    """Beyond the random start, proposals are better than those drawn at random."""
    clever = start("a", trials=40, prune=False)["trials"]
    blind = start("b", trials=40, prune=False, sampler="random")["trials"]

    def late(found: list[Any]) -> float:
        return sum(t["values"]["aggregate"] for t in found[20:]) / 20

    assert late(clever) > late(blind) + 0.03


def test_ctrl_c_ends_cleanly_and_the_next_call_goes_on_as_if_nothing_had_been(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    whole = uninterrupted(start)
    trials.turn, trials.events = 0, {4: lambda: os.kill(os.getpid(), signal.SIGINT)}
    with pytest.raises(Interrupted, match=r"3 of 12 trials done; go on with the same command") as e:
        start("b", trials=12)
    assert e.value.exit_code == 130
    found = json.loads((tmp_path / "b" / "sweep.json").read_text())
    assert found["stopped"] == "interrupted"
    assert found["counts"]["waiting"] == found["counts"]["lost"] == 1
    assert not list((tmp_path / "b").glob(".worker-*"))
    # Interrupted again and again, the trial is not taken for one that ends its process.
    for _ in range(4):
        trials.turn, trials.events = 0, {1: lambda: os.kill(os.getpid(), signal.SIGINT)}
        with pytest.raises(Interrupted):
            start("b", trials=12)
    trials.events = {}
    rest = start("b", trials=12)
    # The interrupted trial's settings come in their turn, as the trial after it.
    assert told(rest) == whole
    assert rest["counts"]["ended"] == 12


def test_sigterm_has_its_own_exit_code(start: Any, trials: FakeTrials) -> None:
    trials.events = {2: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(Interrupted) as caught:
        start()
    assert caught.value.exit_code == 143


def die(study: optuna.Study, output: Path, *, mark: bool = True) -> int:
    """What kill -9 leaves: a running trial, and a worker's directory whose lock is free."""
    worker = studies.Worker(output)
    worker.directory.mkdir()
    (worker.directory / "lock").touch()
    (worker.directory / "states-x").mkdir()
    trial = study.ask()
    if mark:
        trial.set_user_attr(studies.WORKER, worker.name)
    trial.suggest_float("method.alpha", 5.0, 100.0, log=True)
    trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
    trial.suggest_categorical("schedule", ("constant", "cosine"))
    return trial.number


def stored(output: Path, seed: int = 0) -> optuna.Study:
    return optuna.load_study(
        study_name="sweep",
        storage=f"sqlite:///{output / 'study.db'}",
        sampler=studies.SeededSampler("tpe", seed),
    )


def test_a_killed_trial_is_tried_again_in_its_turn(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    whole = uninterrupted(start)
    start("b", trials=11)
    number = die(stored(tmp_path / "b"), tmp_path / "b")
    rest = start("b", trials=12)
    assert rest["trials"][number]["state"] == "lost"
    assert rest["trials"][number + 1]["instead_of"] == number
    assert rest["trials"][number + 1]["params"] == rest["trials"][number]["params"]
    assert told(rest) == whole
    assert not list((tmp_path / "b").glob(".worker-*")), "activations of forget text are left"


def test_settings_that_end_their_process_each_time_are_given_up(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    start(trials=1, prune=False)
    study = stored(tmp_path / "out")
    for _ in range(3):
        number = die(study, tmp_path / "out")
        studies.take_over(study, studies.Worker(tmp_path / "out"), lambda _: None)
    assert number == 3
    result = start(trials=4, prune=False)
    states = [trial["state"] for trial in result["trials"]]
    assert states == ["complete", "lost", "lost", "failed", "complete", "complete"]
    assert "its process ended each time" in result["trials"][3]["reason"]
    assert result["trials"][4]["params"] != result["trials"][3]["params"]


def test_a_worker_elsewhere_whose_heartbeat_stopped_is_taken_over(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    import sqlite3

    start(trials=1)
    number = die(stored(tmp_path / "out"), tmp_path / "out")
    shutil.rmtree(next((tmp_path / "out").glob(".worker-*")))  # it was another machine's
    study = stored(tmp_path / "out")
    study._storage._backend.record_heartbeat(study.trials[-1]._trial_id)  # type: ignore[attr-defined]
    assert start(trials=2)["counts"] | {"asked": 2} == {
        "asked": 2, "ended": 1, "complete": 1, "pruned": 0, "failed": 0,
        "running": 1, "waiting": 0, "lost": 0,
    }, "a live worker's trial was taken"  # fmt: skip
    with sqlite3.connect(tmp_path / "out" / "study.db") as database:
        database.execute("update trial_heartbeats set heartbeat = datetime('now', '-10 minutes')")
    database.close()
    result = start(trials=3)
    assert result["trials"][number]["state"] == "lost"
    assert result["counts"]["ended"] == 3
    assert [t["instead_of"] for t in result["trials"]].count(number) == 1


def test_a_failed_trial_is_recorded_and_the_study_goes_on(start: Any, trials: FakeTrials) -> None:
    def diverge() -> None:
        raise RunError("no checkpoint can be kept")

    def burst() -> None:
        raise ValueError(CANARY)

    def no_memory() -> None:
        raise torch.OutOfMemoryError

    def full() -> None:
        raise OSError(28, "No space left on device")

    trials.events = {2: diverge, 3: burst, 5: no_memory, 6: full}
    result = start(trials=8)
    assert result["counts"]["failed"] == 4
    reasons = [trial["reason"] for trial in result["trials"]]
    assert reasons[1] == "no checkpoint can be kept"
    assert reasons[2].startswith("internal error (ValueError in test_study.py line ")
    assert reasons[4] == "out of memory"
    assert reasons[5] == "No space left on device"
    assert CANARY not in json.dumps(result)
    assert result["trials"][7]["state"] != "failed"


def test_failures_in_a_row_end_it_and_what_is_there_is_kept(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    def diverge() -> None:
        raise RunError("no checkpoint can be kept")

    trials.events = dict.fromkeys((2, 4, 5, 6), diverge)
    with pytest.raises(RunError, match=r"3 trials in a row failed.*no checkpoint.*--search") as e:
        start(max_failures=3, trials=20, prune=False)
    assert e.value.exit_code == 1
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["counts"] | {} == {
        "asked": 20, "ended": 6, "complete": 2, "pruned": 0, "failed": 4,
        "running": 0, "waiting": 0, "lost": 0,
    }  # fmt: skip
    trials.events = {}
    assert start(max_failures=3, trials=8, prune=False)["counts"]["ended"] == 8


def test_a_value_that_is_no_number_is_a_failure(
    start: Any, trials: FakeTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dataclasses.replace(card(0.5, 0.5), task_aggregate=float("nan"))
    monkeypatch.setattr(module, "run_trial", lambda *_: TrialResult(broken, {}, [], {}))
    result = start(trials=2)
    assert [t["state"] for t in result["trials"]] == ["failed", "failed"]
    assert result["best"] is None


def test_hopeless_trials_are_pruned_and_not_otherwise(start: Any, trials: FakeTrials) -> None:
    pruned = [t for t in start("a", trials=14)["trials"] if t["state"] == "pruned"]
    assert any("below the median" in t["reason"] for t in pruned)
    assert all(t["number"] >= 5 for t in pruned if "median" in t["reason"])
    assert start("b", trials=8, prune=False)["counts"]["pruned"] == 0
    several = start("c", trials=14, seed=3, objectives=("forgetting", "retention"))
    reasons = {t["reason"] for t in several["trials"] if t["state"] == "pruned"}
    assert reasons <= {"destroyed at its first 3 validations"}
    destroyed = {t["number"] for t in several["trials"] if t["params"]["learning_rate"] > 0.03}
    assert destroyed
    assert destroyed == {t["number"] for t in several["trials"] if t["state"] == "pruned"}


def test_a_destroyed_model_is_never_the_best(
    start: Any, trials: FakeTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(_task: Any, method: Any, *_: object) -> TrialResult:
        good = method.alpha > 30
        return TrialResult(card(0.35, 0.9) if good else card(1.0, 0.4), {}, [], {})

    monkeypatch.setattr(module, "run_trial", result)
    found = start(trials=8)
    best = found["trials"][found["best"]]
    assert best["params"]["method.alpha"] > 30
    assert not best["destroyed"]
    assert max(t["values"]["aggregate"] for t in found["trials"]) > best["values"]["aggregate"]


def test_the_same_settings_are_not_run_twice(start: Any, trials: FakeTrials) -> None:
    result = start(trials=6, search=("schedule=choice:constant,cosine",))
    assert trials.turn == 2
    assert result["counts"]["complete"] == 6
    again = [trial for trial in result["trials"] if trial["same_as"] is not None]
    assert len(again) == 4
    for trial in again:
        assert trial["values"] == result["trials"][trial["same_as"]]["values"]


def test_a_worker_of_other_settings_is_refused_with_what_differs(
    start: Any, trials: FakeTrials, row_files: dict[str, Path], tmp_path: Path
) -> None:
    start(trials=1)
    for changes, words in (
        ({"search": WORDS[:2]}, ("search schedule",)),
        (
            {"search": ("method.alpha=log:5:90", *WORDS[1:])},
            ("search method.alpha high 100.0", "90.0"),
        ),
        ({"objectives": ("forgetting",)}, ("objectives", "forgetting")),
        ({"seed": 3}, ("training seed 0", "3")),
        ({"options": {"epochs": 2}}, ("training epochs null", "2")),
        ({"retain": None, "objectives": ("forgetting",)}, ("retain set",)),
        ({"forget": str(row_files["nonmembers"])}, ("data_hmac_sha256 forget",)),
        ({"dtype": "bfloat16"}, ('dtype "float32"', '"bfloat16"')),
        ({"prune": False}, ("prune true", "false")),
    ):
        message = refusal(lambda changes=changes: start(trials=2, **changes))  # type: ignore[misc]
        for word in words:
            assert word in message
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    start(trials=1, options={"micro_batch_size": 2})
    assert (
        json.loads(before)["trials"]
        == json.loads((tmp_path / "out" / "sweep.json").read_bytes())["trials"]
    )


def test_a_shared_database_takes_workers_of_any_output(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    start("a", study=url, trials=3)
    result = start("b", study=url, trials=5)
    assert result["counts"]["ended"] == 5
    assert not (tmp_path / "b" / "study.db").exists()
    assert "another --study-name" in refusal(lambda: start("c", study=url, seed=9))
    assert not (tmp_path / "c").exists()
    assert start("c", study=url, study_name="other", seed=9, trials=1)["counts"]["ended"] == 1


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_trials_beyond_the_last_are_set_aside(start: Any, trials: FakeTrials, tmp_path: Path) -> None:
    """Two workers that both see one trial left begin two; the later one is dropped."""
    start(trials=2)
    # Another worker's trial, begun after ours had counted.
    trials.events = {}
    original = module._Session._is_next

    def counted_before_another(self: Any) -> bool:
        answer = original(self)
        if answer:
            self.study.ask().set_user_attr(studies.WORKER, "elsewhere")
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Session, "_is_next", counted_before_another)
        result = start(trials=3)
    assert result["counts"] | {} == {
        "asked": 3, "ended": 2, "complete": 2, "pruned": 0, "failed": 0,
        "running": 1, "waiting": 0, "lost": 1,
    }  # fmt: skip


def test_a_sweep_goes_on_beside_what_earlier_versions_wrote(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    start(trials=1)
    for name in ("best", "front"):
        (tmp_path / "out" / name).mkdir()
    assert start(trials=2)["counts"]["ended"] == 2
    assert (tmp_path / "out" / "best").is_dir()


def test_overwrite_begins_anew_and_spares_what_is_no_sweep(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    start(trials=2)
    assert start(trials=1, overwrite=True, seed=4)["counts"]["ended"] == 1
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "holds no sweep" in refusal(lambda: start("thesis", overwrite=True))
    assert (other / "thesis.txt").read_text() == "mine"
    with studies.Worker(tmp_path / "out").at_work():
        assert "a worker is at work" in refusal(lambda: start(trials=1, overwrite=True))


def test_a_worker_that_was_taken_for_gone_leaves_its_trial_and_goes_on(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    """A machine that slept: another worker has failed its trial and put the settings in line."""

    def fail_it() -> None:
        study = stored(tmp_path / "out")
        running = next(t for t in study.trials if t.state.name == "RUNNING")
        study.tell(running.number, state=optuna.trial.TrialState.FAIL)
        studies.put_in_line(study, study.trials[running.number])

    trials.events = {2: fail_it}
    result = start(trials=4, prune=False)
    states = [trial["state"] for trial in result["trials"]]
    assert states == ["complete", "lost", "complete", "complete", "complete"]
    assert result["trials"][2]["instead_of"] == 1


def test_a_database_that_breaks_in_the_middle_is_said_so(
    start: Any, trials: FakeTrials, tmp_path: Path
) -> None:
    import sqlite3

    def drop() -> None:
        with sqlite3.connect(tmp_path / "out" / "study.db") as database:
            database.execute("drop table trial_user_attributes")
        database.close()

    trials.events = {2: drop}
    with pytest.raises(RunError, match="the study's database failed"):
        start(trials=4)
    assert not list((tmp_path / "out").glob(".worker-*"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("study.db", ("no database URL", "sqlite:////shared/study.db")),
        ("oracle9://x/y", ("unknown kind of database",)),
        ("sqlite://", ("names no file",)),
        ("sqlite:////nowhere/at/all/study.db", ("/nowhere/at/all does not exist",)),
        ("postgresql+psycopg2://me:geheim@db/x", ("pip install psycopg2", "me:***@db")),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    start: Any, trials: FakeTrials, tmp_path: Path, url: str, words: tuple[str, ...]
) -> None:
    message = refusal(lambda: start(study=url))
    assert message.startswith("--study ") or message.startswith("--study:")
    for word in words:
        assert word in message
    assert "geheim" not in message
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_database_is_refused(start: Any, trials: FakeTrials, tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, but long enough to be looked at")
    message = refusal(lambda: start(study=f"sqlite:///{tmp_path / 'notes.db'}"))
    assert "does not open" in message
    assert not (tmp_path / "out").exists()


def test_a_worker_that_meets_anothers_tables_half_made_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import IntegrityError

    waits: list[float] = []
    monkeypatch.setattr("expunge.search.study.time.sleep", waits.append)
    errors: list[Exception] = [
        IntegrityError("insert", None, Exception("UNIQUE")),
        StorageInternalError("tables"),
    ]

    made: Any = object()

    def create() -> Any:
        if errors:
            raise errors.pop()
        return made

    assert studies._made_or_loaded(create) is made
    assert len(waits) == 2
    errors += [StorageInternalError("for good")] * 9
    with pytest.raises(StorageInternalError):
        studies._made_or_loaded(create)
    assert len(waits) == 5
