"""Studies of Optuna: storage that waits for its database, trials that are planned, and what is left of dead workers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import optuna
import pandas as pd
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState, create_trial

from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.parallel.liveness import alive, this_process
from pdiff.seeds import sample_seed
from pdiff.sweeps.schema import Pruner, Sampler, Sweep
from pdiff.sweeps.storage import GRACE, open_storage

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)
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
