"""What a trial costs beside its stages: trials of a sweep that do nothing, timed."""

from __future__ import annotations

import time
import uuid

import optuna
from tqdm.auto import tqdm

from pdiff.sweeps.schema import Sweep
from pdiff.sweeps.search import Study
from pdiff.sweeps.storage import open_storage

DIMENSIONS = 3  # parameters of a trial, as in the sweep of the paper's settings


def measure(url: str, *, trials: int, sampler: str) -> dict[str, float]:
    """Seconds a trial, over a study that is deleted afterwards.

    Args:
        url: storage, see `open_storage`.
        trials: how many; samplers get slower the more there are.
        sampler: its kind.

    Returns:
        `seconds/plan`: to let a trial wait; `seconds/trial`: to take it, ask for its parameters, and tell its value.
    """
    parameters = {f"x{k}": {"kind": "float", "low": 0, "high": 1} for k in range(DIMENSIONS)}
    sweep = Sweep(objectives={"x0": "minimize"}, parameters=parameters, sampler={"kind": sampler})
    storage, name = open_storage(url), f"overhead-{uuid.uuid4().hex[:8]}"
    optuna.create_study(study_name=name, storage=storage).set_metric_names(["x0"])
    try:
        study = Study(name, storage, sweep, {})
        begin = time.perf_counter()
        study.plan(trials)
        planned = time.perf_counter()
        for _ in tqdm(range(trials), desc=f"{sampler} trials", unit="trial", disable=None):
            study.optimize(_empty, n_trials=1)
        ended = time.perf_counter()
    finally:
        optuna.delete_study(study_name=name, storage=storage)
    return {"seconds/plan": (planned - begin) / trials, "seconds/trial": (ended - planned) / trials}


def _empty(trial: optuna.Trial) -> float:
    """What the objective of a sweep asks and tells, and nothing else."""
    chosen = trial.study.sweep.suggest(trial, {})
    trial.set_user_attr("overrides", chosen)
    trial.set_user_attr("run", uuid.uuid4().hex)
    return float(chosen["x0"])
