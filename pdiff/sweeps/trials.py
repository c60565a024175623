"""The trials of a study: planned, kept alive, retried when their worker died, and summarized."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import optuna
import pandas as pd
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from pdiff.errors import Failure, UserError
from pdiff.parallel.liveness import alive, this_process
from pdiff.sweeps.storage import exists, file_of, named, open_storage

HEARTBEAT = 10.0  # seconds between signs of life of a running trial
GRACE = 90.0  # seconds without one until a trial is stale
REASON = 400  # characters of the error of a trial in a message
RETRIES = 3  # of a trial whose worker died; one that kills its worker every time is given up


@contextmanager
def repeating(call: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call something in a thread, every so many seconds, until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            with suppress(Failure):  # the thread that works meets it, too, and says so
                call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def heartbeats(trial: optuna.Trial) -> Iterator[None]:
    """Record which process runs a trial, and signs of life until the block ends."""
    count = itertools.count()

    def beat() -> None:
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr("heartbeat", next(count))

    trial.set_user_attr("process", this_process())
    beat()
    with repeating(beat, HEARTBEAT):
        yield


class StaleTrials:
    """Fails running trials whose worker is dead.

    The death of a process of this host is known at once. That of another host's is concluded when its heartbeats stop;
    how long ago the last one came is measured by the clock of the process that watches, so no two clocks are compared.
    """

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Any, float]] = {}  # number of a trial -> its last sign of life, when it came
        self.looked = time.monotonic()

    def fail(self, study: optuna.Study) -> None:
        """Look at all running trials, and fail those that are stale."""
        now = time.monotonic()
        if now - self.looked > HEARTBEAT:  # the storage may have been away, for the workers as well
            self.seen = {}
        self.looked, seen = now, {}
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = trial.user_attrs.get("process")  # none, if its worker died before it could say
            sign = (process, trial.user_attrs.get("heartbeat"))
            last, since = self.seen.get(trial.number, (None, now))
            seen[trial.number] = (sign, since if sign == last else now)
            if (process and not alive(process)) or now - seen[trial.number][1] > GRACE:
                with suppress(UpdateFinishedTrialError):  # by another process since, or by a call whose answer was lost
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        self.seen = seen


def plan(study: optuna.Study, count: int) -> None:
    """Add waiting trials until there are so many in all; a trial and its retries count once."""
    for _ in range(count - len(study.get_trials(deepcopy=False)) + len(retried(study))):
        study.add_trial(create_trial(state=TrialState.WAITING))


def attempts(trial: FrozenTrial) -> list[int]:
    """Numbers of the trials of which a trial is the retry, the first one first."""
    return trial.user_attrs.get("attempts", [])


def retried(study: optuna.Study) -> set[int]:
    """Numbers of the trials that have a retry."""
    return {number for trial in study.get_trials(deepcopy=False) for number in attempts(trial)}


def lost(study: optuna.Study) -> list[FrozenTrial]:
    """Trials to retry: those that failed without an error, since their worker was interrupted, or died at most
    `RETRIES` times."""
    done, trials, found = retried(study), study.get_trials(deepcopy=False), []
    for trial in trials:
        history = [trials[number] for number in (*attempts(trial), trial.number)]
        deaths = sum("interrupted" not in past.user_attrs for past in history)
        failed = trial.state == TrialState.FAIL and "error" not in trial.user_attrs
        if failed and trial.number not in done and deaths <= RETRIES:
            found.append(trial)
    return found


def retry(study: optuna.Study) -> list[str]:
    """Queue lost trials again with the same parameters. Only one process of a study may do this.

    Returns:
        The runs of the trials that failed.
    """
    trials = lost(study)
    for trial in trials:
        again = create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"attempts": [*attempts(trial), trial.number]},
            system_attrs=trial.system_attrs,  # where samplers keep, for example, the point of a grid
        )
        study.add_trial(again)
    return [trial.user_attrs["run"] for trial in trials if "run" in trial.user_attrs]


def is_late(study: optuna.Study) -> bool:
    """Whether the time of a sweep is up, so that no further trial begins."""
    return (study.user_attrs["deadline"] or math.inf) < time.time()


def values_text(study: optuna.Study, values: list[float]) -> str:
    """Names and values of the objectives, for people."""
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(study.metric_names, values, strict=True))


def best(study: optuna.Study, count: int = 1) -> list[FrozenTrial]:
    """The best trial, or at most `count` trials of the Pareto front, spread over the first objective."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return []
    if len(study.directions) == 1:
        return [study.best_trial]
    maximize = study.directions[0] == optuna.study.StudyDirection.MAXIMIZE
    front = sorted(study.best_trials, key=lambda trial: trial.values[0], reverse=maximize)
    positions = {round(k * (len(front) - 1) / max(count - 1, 1)) for k in range(count)}
    return [front[position] for position in sorted(positions)]


def best_found(study: optuna.Study) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and parameters for the run of a sweep: the best value of each objective, and the best trial."""
    found = best(study)
    if not found:
        return {}, {}
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    metrics: dict[str, float] = {"trials": len(complete)}
    for k, (name, direction) in enumerate(zip(study.metric_names, study.directions, strict=True)):
        choose = max if direction == optuna.study.StudyDirection.MAXIMIZE else min
        metrics[f"best/{name}"] = choose(trial.values[k] for trial in complete)
    return metrics, {f"best.{name}": value for name, value in found[0].params.items()} | {"best.trial": found[0].number}


def reason(trial: FrozenTrial) -> str:
    """Why a trial did not complete."""
    if trial.state != TrialState.FAIL:
        return trial.user_attrs.get("pruned", "")
    return trial.user_attrs.get("error") or ("interrupted" if "interrupted" in trial.user_attrs else "its worker died")


def failure(study: optuna.Study) -> str:
    """Why a study whose trials have ended found nothing; empty where a trial completed, or all were pruned."""
    trials = study.get_trials(deepcopy=False)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and trial.number not in retried(study)]
    if not failed or any(trial.state in (TrialState.COMPLETE, TrialState.WAITING) for trial in trials):
        return ""
    first = " ".join(reason(failed[0]).split())[:REASON]
    return f"no trial completed, {len(failed)} of {len(trials)} failed; trial {failed[0].number}: {first}"


def table(study: optuna.Study) -> pd.DataFrame:
    """One row per trial: number, state, objectives, parameters, seconds, why it ended early, its run."""
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


def studies(url: str) -> pd.DataFrame:
    """One row per study of a storage: its state, its trials, its best value; none where there is no storage yet.

    Raises:
        UserError: a storage that cannot be opened; a file in a folder that does not exist.
    """
    if not exists(url):
        if not (folder := file_of(url).absolute().parent).is_dir():
            raise UserError(f"{named(url)}: there is no folder {folder}")
        return pd.DataFrame()
    storage = open_storage(url)
    rows = []
    for name in sorted(optuna.get_all_study_names(storage)):
        study = optuna.load_study(study_name=name, storage=storage)
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        counts = {state.name.lower(): states.count(state) for state in TrialState}
        left = counts["waiting"] or lost(study)
        state = "running" if counts["running"] else "unfinished" if left else "finished"
        found = best(study)
        shown = values_text(study, found[0].values) if found and study.metric_names else ""
        rows.append({"study": name, "state": state, **counts, "best": shown})
    return pd.DataFrame(rows)
