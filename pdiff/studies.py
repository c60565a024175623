"""Studies of Optuna: storage that waits for its database, trials that are planned, and what is left of dead workers."""

from __future__ import annotations

import inspect
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial, wraps
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
)

from pdiff import config
from pdiff.diffusion import sample_seed
from pdiff.errors import UserError
from pdiff.processes import alive, this_process
from pdiff.space import Pruner, Sampler, Sweep

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)

STORAGE = "sqlite:///optuna.db"
HEARTBEAT = 10  # seconds between signs of life of a running trial
GRACE = 90  # seconds without one until it is taken for dead: longer than a database may be away
PATIENCE = 300.0  # seconds to wait for a database that is away
RETRIES = 3  # of a trial whose worker died; one that kills its worker every time is given up
UNFINISHED = (TrialState.WAITING, TrialState.RUNNING)
SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "random": optuna.samplers.RandomSampler,
    "grid": optuna.samplers.GridSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "qmc": optuna.samplers.QMCSampler,
}
PRUNERS: dict[str, Callable[..., optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "patient": partial(optuna.pruners.PatientPruner, None),
    "threshold": optuna.pruners.ThresholdPruner,
}


class Exhausted(Exception):
    """No planned trial is left."""


def waiting_for_database(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a storage that tries again, less and less often, while its database does not answer."""

    @wraps(call)
    def patient(*arguments: Any, **options: Any) -> Any:
        end, pause = time.monotonic() + PATIENCE, 0.2
        while True:
            try:
                return call(*arguments, **options)
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
                if not _away(cause) or time.monotonic() > end:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    return patient


def _away(error: BaseException | None) -> bool:
    """Whether an error says that the connection to a database was refused or lost; a second statement after the one
    that lost it, as Optuna tries it, is told to roll back first."""
    lasting = (DataError, IntegrityError, NotSupportedError, ProgrammingError)  # waiting does not mend these
    return isinstance(error, DBAPIError | PendingRollbackError) and not isinstance(error, lasting)


def without_password(url: str) -> str:
    """An address of a storage for people to read."""
    return make_url(url).render_as_string(hide_password=True) if "://" in url and not _journal(url) else url


def _journal(url: str) -> str | None:
    """The path of a journal file, if a storage is one."""
    if url.startswith("journal://"):
        return url.removeprefix("journal://")
    return url if url.endswith(".log") else None


def open_storage(url: str, *, patient: bool = False) -> BaseStorage:
    """The storage at an address, created where it does not exist.

    Args:
        url: `journal:///path` or a path that ends in `.log`, or an address of SQLAlchemy's. Databases record signs of
            life; a journal has none.
        patient: wait for a database that does not answer.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if path := _journal(url):
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(path))
        parsed = make_url(url)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if parsed.drivername.startswith("sqlite"):
            if parsed.database in (None, "", ":memory:"):
                raise UserError(f"--storage {url}: a database in memory is nobody else's, expected sqlite:///FILE")
            with sqlite3.connect(parsed.database, timeout=60) as database:
                database.execute("PRAGMA journal_mode=WAL")
            options["connect_args"] = {"timeout": 60, "isolation_level": None}
        make = waiting_for_database(RDBStorage) if patient else RDBStorage
        storage = make(url, options, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    except (ImportError, OSError, RuntimeError, SQLAlchemyError, sqlite3.Error) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise UserError(f"--storage {_readable(url)}: cannot be opened: {reason}") from None
    if parsed.drivername.startswith("sqlite"):  # knows no SELECT FOR UPDATE: two workers would take the same trial
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    for name, method in inspect.getmembers(storage, inspect.ismethod):
        if not name.startswith("__"):
            setattr(storage, name, waiting_for_database(method))
    return storage


def _readable(url: str) -> str:
    try:
        return without_password(url)
    except ArgumentError:
        return url


def default_storage() -> str:
    """The address in PDIFF_STORAGE, which no list of processes shows, else a file in the current folder."""
    return os.environ.get("PDIFF_STORAGE") or STORAGE


class Study(optuna.Study):
    """A study whose trials are planned beforehand: a worker takes one that waits and never makes one more."""

    def __init__(self, name: str, storage: BaseStorage, sweep: Sweep, grid: Mapping[str, list[Any]]) -> None:
        self.sweep, self.grid = sweep, grid
        super().__init__(name, storage, make_sampler(sweep.sampler, grid), make_pruner(sweep.pruner))

    def ask(self, fixed_distributions: dict[str, Any] | None = None) -> optuna.Trial:
        """Take a trial that waits.

        Its random numbers depend on the sweep's seed and its number alone, so that no two workers draw the same.

        Raises:
            Exhausted: none waits.
        """
        self._thread_local.cached_all_trials = None
        for trial in self.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            try:
                taken = self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            except optuna.exceptions.UpdateFinishedTrialError:
                continue
            if taken:
                self._storage.set_trial_user_attr(trial._trial_id, "process", this_process())
                self.sampler = make_sampler(self.sweep.sampler, self.grid, number=trial.number)
                return optuna.Trial(self, trial._trial_id)
        raise Exhausted

    def plan(self, trials: int) -> None:
        """Let trials wait until there are so many in all, those that were begun again not counted."""
        missing = trials - len(self.get_trials(deepcopy=False)) + len(superseded(self))
        for _ in range(missing):
            self.add_trial(create_trial(state=TrialState.WAITING))


def make_sampler(settings: Sampler, grid: Mapping[str, list[Any]], *, number: int = 0) -> optuna.samplers.BaseSampler:
    """The sampler of one trial.

    Raises:
        UserError: options that it does not have, or does not take.
    """
    if settings.kind in ("grid", "qmc"):  # all trials share one sequence
        options: dict[str, Any] = {"seed": settings.seed}
    else:
        options = {"seed": sample_seed(settings.seed, number) % 2**32}
    if settings.kind == "grid":
        options["search_space"] = grid
    if settings.kind in ("gp", "cmaes", "qmc"):
        options["warn_independent_sampling"] = False
    return _make("sampler", SAMPLERS[settings.kind], options, settings.options)


def make_pruner(settings: Pruner) -> optuna.pruners.BasePruner:
    """The pruner that the settings name.

    Raises:
        UserError: options that it does not have, or does not take.
    """
    return _make("pruner", PRUNERS[settings.kind], {}, settings.options)


def _make(what: str, kind: Callable[..., Any], own: dict[str, Any], options: dict[str, Any]) -> Any:
    known = [name for name in inspect.signature(kind).parameters if name not in own]
    for name in options:
        if name not in known:
            raise UserError(f"{what}.options.{name}: unknown option; {config.nearest(name, known)}")
    try:
        return kind(**own, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}.options: {' '.join(str(error).split())}") from None


def superseded(study: optuna.Study) -> set[int]:
    """Numbers of trials that were begun again as others."""
    histories = (RetryHeartbeatStaleTrialCallback.retry_history(t) for t in study.get_trials(deepcopy=False))
    return {number for history in histories for number in history}


def fail_dead(study: optuna.Study) -> None:
    """End the trials of workers that are dead: known at once of this host's, of others' by their missing heartbeat."""
    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        process = trial.user_attrs.get("process")
        since = datetime.now() - (trial.datetime_start or datetime.now())
        dead = not alive(process) if process else since > timedelta(seconds=GRACE)  # died between two statements
        if dead:
            try:
                study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            except optuna.exceptions.UpdateFinishedTrialError:
                continue


def unlucky(study: optuna.Study) -> list[FrozenTrial]:
    """Copies of the trials that failed for no reason of their own, and were not begun again: those that say no reason,
    since their workers were interrupted, or died a few times."""
    again, trials, found = superseded(study), study.get_trials(deepcopy=False), []
    for trial in study.get_trials(states=(TrialState.FAIL,)):
        history = [trials[n] for n in (*RetryHeartbeatStaleTrialCallback.retry_history(trial), trial.number)]
        deaths = sum("interrupted" not in past.user_attrs for past in history)
        if trial.number not in again and "error" not in trial.user_attrs and deaths <= RETRIES:
            found.append(trial)
    return found


def requeue(study: optuna.Study) -> list[str]:
    """Let unlucky trials wait again, with the same parameters. Only one process of a study may do this.

    Returns:
        The runs of the trials that failed.
    """
    runs = []
    for trial in unlucky(study):
        runs += filter(None, [trial.user_attrs.get("run")])
        trial.user_attrs = {}
        RetryHeartbeatStaleTrialCallback()(study, trial)
    return runs


def values_text(study: optuna.Study, values: list[float]) -> str:
    """Values of objectives for people: name and value."""
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(study.metric_names, values, strict=True))


def best(study: optuna.Study, count: int = 1) -> list[FrozenTrial]:
    """The best trials: the best one, or at most `count` of the Pareto front, spread over the first objective."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return []
    if len(study.directions) == 1:
        return [study.best_trial]
    maximize = study.directions[0] == optuna.study.StudyDirection.MAXIMIZE
    front = sorted(study.best_trials, key=lambda trial: trial.values[0], reverse=maximize)
    positions = {round(k * (len(front) - 1) / max(count - 1, 1)) for k in range(count)}
    return [front[position] for position in sorted(positions)]


def reason(trial: FrozenTrial) -> str:
    """Why a trial did not complete."""
    if trial.state != TrialState.FAIL:
        return trial.user_attrs.get("pruned", "")
    return trial.user_attrs.get("error") or ("interrupted" if "interrupted" in trial.user_attrs else "its worker died")


def table(study: optuna.Study) -> pd.DataFrame:
    """One row a trial: number, state, objectives, parameters, seconds, why it ended early, its run."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        seconds = trial.duration.total_seconds() if trial.duration else None
        rows.append(
            {"trial": trial.number, "state": trial.state.name}
            | dict(zip(study.metric_names, trial.values or [None] * len(study.directions), strict=False))
            | trial.params
            | {"seconds": seconds, "reason": reason(trial), "run": trial.user_attrs.get("run", "")}
        )
    return pd.DataFrame(rows)


def listed(url: str) -> pd.DataFrame:
    """One row a study of a storage: its state, its trials, its best value."""
    storage = open_storage(url)
    rows = []
    for name in sorted(optuna.get_all_study_names(storage)):
        study = optuna.load_study(study_name=name, storage=storage)
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        counts = {state.name.lower(): states.count(state) for state in TrialState}
        left = counts["waiting"] or unlucky(study)
        state = "running" if counts["running"] else "unfinished" if left else "finished"
        found = best(study)
        shown = values_text(study, found[0].values) if found and study.metric_names else ""
        rows.append({"study": name, "state": state, **counts, "best": shown})
    return pd.DataFrame(rows)
