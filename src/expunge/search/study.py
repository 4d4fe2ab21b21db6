"""A study in a database that any number of workers share, and that outlives each of them.

A trial is *lost* where its process ended before it did: killed, interrupted, cut off from the database.
It is marked failed and its settings are put in line again. It takes no part in counting, so that a
sweep of N trials is N that came to an end, and a trial's draws depend on how many came before it,
not on how often the sweep was interrupted.

A worker holds a lock on a directory of its own in the output, so that others there see at once that it
is gone; those on other machines see that its heartbeat in the database stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.disk import held
from expunge.errors import InputError, install
from expunge.runs.scratch import differences
from expunge.search.inputs import Sampler, Task

try:
    import optuna
    from optuna.samplers import TPESampler
except ModuleNotFoundError:
    raise InputError(f"sweep: needs Optuna, which is not installed; {install('search')}") from None

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

DATABASE = "study.db"
SETTINGS, TARGET = "settings", "target"
WORKER, REASON, SET_ASIDE, TRIES = "worker", "reason", "set_aside", "tries"
# What a driver is called where it is to be had, if not by its module's name.
_DRIVERS = {"MySQLdb": "mysqlclient", "psycopg2": "psycopg2-binary"}
WORKERS = ".worker-"
_HEARTBEAT = 20
"""Seconds between two signs of life in the database."""
_GRACE = 120
"""Seconds without one after which a worker counts as gone."""
_MOST_TRIES = 3
_RANDOM_STARTUP = 10
_PRUNER_STARTUP = 5
_PRUNER_WARMUP = 2
_WAIT_FOR_LOCK = 60
_PAUSES = (0.5, 1.0, 2.0)
"""Seconds between attempts to open a study that other workers may be making."""


class SeededSampler(TPESampler):
    """Draws each trial's settings from a generator of its own, seeded by its place in the study.

    Of a grid a trial's settings are the point at its place.
    """

    def __init__(self, kind: Sampler, seed: int, grid: Sequence[Mapping[str, Any]] = ()) -> None:
        self._kind, self._seed, self._grid = kind, seed, grid
        super().__init__()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Begins anew."""
        import numpy as np

        place = sum(counts(other) for other in all_trials(study) if other.number < trial.number)
        self._point = self._grid[place % len(self._grid)] if self._grid else {}
        seed = int(np.random.SeedSequence([self._seed, place]).generate_state(1)[0])
        super().__init__(
            seed=seed,
            # Before so many trials it draws at random.
            n_startup_trials=_RANDOM_STARTUP if self._kind == "tpe" else sys.maxsize,
            # Running trials count as bad ones, so that workers do not try the same at once.
            constant_liar=True,
        )

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The point's value, or a drawn one."""
        if param_name in self._point:
            return self._point[param_name]
        return super().sample_independent(study, trial, param_name, param_distribution)


def all_trials(study: Study) -> list[FrozenTrial]:
    """Every trial as the database has it now."""
    return study.get_trials(deepcopy=False)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial's process ended before it did."""
    return trial.state.name == "FAIL" and REASON not in trial.user_attrs


def is_given_up(trial: FrozenTrial) -> bool:
    """Whether a trial was lost so often that it is its settings that end the process."""
    tries = int(trial.user_attrs.get(TRIES, 1))
    return is_lost(trial) and tries >= _MOST_TRIES and SET_ASIDE not in trial.user_attrs


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the N of a sweep; one that runs or waits to be tried again is."""
    return not is_lost(trial) or is_given_up(trial)


def shown_url(url: str) -> str:
    """A database URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def check_url(url: str) -> None:
    """Raises InputError for what is no database URL, or one that no installed driver opens."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        parsed = make_url(url)
        parsed.get_dialect().import_dbapi()
    except NoSuchModuleError:  # an ArgumentError, too
        why = "unknown kind of database; use sqlite, postgresql or mysql"
        raise InputError(f"--study {shown_url(url)}: {why}") from None
    except (ArgumentError, ValueError):
        raise InputError(
            "--study: is no database URL; write for example sqlite:////shared/study.db or"
            " postgresql://user@host/database"
        ) from None
    except ImportError as error:
        driver = _DRIVERS.get(str(error.name), error.name)
        why = f"its driver is not installed; run pip install {driver}"
        raise InputError(f"--study {shown_url(url)}: {why}") from None
    if parsed.get_backend_name() != "sqlite":
        return
    if not parsed.database:
        raise InputError("--study sqlite://: names no file; write sqlite:////shared/study.db")
    parent = Path(str(parsed.database)).absolute().parent
    if not parent.is_dir():
        why = f"the directory {parent} does not exist; make it first"
        raise InputError(f"--study {shown_url(url)}: {why}")


def open_study(url: str, name: str, task: Task) -> Study:
    """Opens the study, or makes it, for a worker of these settings.

    Raises InputError where the database does not open, or holds a study of this name with other
    settings.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        study = _made_or_loaded(
            lambda: optuna.create_study(
                storage=_storage(url),
                study_name=name,
                directions=["maximize"] * len(task.inputs.objectives),
                load_if_exists=True,
                sampler=SeededSampler(task.inputs.sampler, task.space.options.seed, task.grid),
                pruner=optuna.pruners.MedianPruner(
                    n_startup_trials=_PRUNER_STARTUP, n_warmup_steps=_PRUNER_WARMUP
                ),
            )
        )
        if SETTINGS not in study.user_attrs:
            study.set_user_attr(SETTINGS, dict(task.settings))
        check_same_settings(study, task)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        raise InputError(
            f"--study {shown_url(url)}: does not open ({type(error).__name__}); check that the"
            " database runs, that it is one of Optuna's and that it may be written to"
        ) from None
    return study


def _made_or_loaded(create: Callable[[], Study]) -> Study:
    """The study; tried again for a while where the database objects.

    Workers that start together all find no tables and all make them: every one but the first then
    meets an error, and finds them at its next attempt.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    for pause in _PAUSES:
        try:
            return create()
        except (SQLAlchemyError, StorageInternalError, RuntimeError):
            time.sleep(pause)
    return create()


def check_same_settings(study: Study, task: Task) -> None:
    """Raises InputError that names the first setting in which the study has another value."""
    before = study.user_attrs[SETTINGS]
    now = json.loads(json.dumps(task.settings))
    for place, old, new in differences(before, now, "", " "):
        raise InputError(
            f"study {study.study_name!r} has {place} {json.dumps(old)}, this worker has"
            f" {json.dumps(new)}; give the same, another --study-name, or another --output"
        )


def _storage(url: str) -> RDBStorage:
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage

    # Several workers write to one file, and SQLite gives up waiting for the others after 5 s.
    waits = {"connect_args": {"timeout": _WAIT_FOR_LOCK}} if url.startswith("sqlite") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(
            url,
            engine_kwargs=waits,
            heartbeat_interval=_HEARTBEAT,
            grace_period=_GRACE,
            heartbeat_stale_trial_callback=put_in_line,
        )


def put_in_line(study: Study, lost: FrozenTrial) -> None:
    """Has a lost trial's settings tried again, unless they were lost too often."""
    if not lost.params or is_given_up(lost):
        return
    tries = int(lost.user_attrs.get(TRIES, 1))
    if SET_ASIDE not in lost.user_attrs:
        tries += 1
    study.enqueue_trial(lost.params, user_attrs={TRIES: tries, "instead_of": lost.number})


class Worker:
    """This process at work on a study: its directory, and the lock on it while it lives."""

    def __init__(self, output: Path) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._output = output
        self.directory = output / f"{WORKERS}{self.name}"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Holds the lock for the body; the directory goes at the end."""
        self.directory.mkdir(mode=0o700)
        with held(self.directory / "lock", f"{self.directory}: is another worker's"):
            try:
                yield
            finally:
                shutil.rmtree(self.directory, ignore_errors=True)

    def gone(self) -> dict[str, Path]:
        """Workers of this output that ended without clearing up, with what they left."""
        found = {}
        for directory in self._output.glob(f"{WORKERS}*"):
            if directory != self.directory and is_left(directory):
                found[directory.name.removeprefix(WORKERS)] = directory
        return found


def is_left(directory: Path) -> bool:
    """Whether nobody holds a worker's lock."""
    try:
        if not (directory / "lock").exists():
            # Just made, or just removed; or its process ended between the two.
            return time.time() - directory.stat().st_mtime > _WAIT_FOR_LOCK
        with held(directory / "lock", "another worker's"):
            return True
    except (InputError, FileNotFoundError):
        return False


def is_worked_on(output: Path) -> bool:
    """Whether a worker is alive in an output."""
    return any(not is_left(directory) for directory in output.glob(f"{WORKERS}*"))


def take_over(study: Study, worker: Worker, say: Callable[[str], None]) -> None:
    """Marks the trials of workers that are gone as failed, has them tried again, clears up."""
    left = worker.gone()
    for trial in all_trials(study):
        if trial.state.name != "RUNNING" or trial.user_attrs.get(WORKER) not in left:
            continue
        try:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            continue  # another worker was faster
        say(f"trial {trial.number}: its process had ended; its settings are tried again")
        put_in_line(study, next(t for t in all_trials(study) if t.number == trial.number))
    for directory in left.values():
        shutil.rmtree(directory, ignore_errors=True)


def is_of_the_database(error: BaseException | None) -> bool:
    """Whether the database is what failed, or what was being handled when something else did."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    while error is not None:
        if isinstance(error, StorageInternalError | SQLAlchemyError):
            return True
        error = error.__context__
    return False
