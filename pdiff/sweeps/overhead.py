"""What a trial costs beside its stages: trials of a sweep that do nothing, timed."""

from __future__ import annotations

import time
import uuid

import optuna
from tqdm.auto import tqdm

from pdiff.sweeps.schema import Sweep
from pdiff.sweeps.search import load_study
from pdiff.sweeps.storage import open_storage
from pdiff.sweeps.trials import plan

DIMENSIONS = 3  # parameters of a trial, as in the sweep of the paper's settings


def measure(url: str, *, trials: int, sampler: str) -> dict[str, float]:
    """Seconds per trial, over a study that is deleted afterwards.

    Args:
        url: storage, see `open_storage`.
        trials: how many; samplers get slower the more there are.
        sampler: its kind.

    Returns:
        `seconds/plan`: to add a waiting trial; `seconds/trial`: to take it, sample its parameters, and record its
        value.
    """
    parameters = {f"x{k}": {"kind": "float", "low": 0, "high": 1} for k in range(DIMENSIONS)}
    sweep = Sweep(objectives={"x0": "minimize"}, parameters=parameters, sampler={"kind": sampler})
    storage, name = open_storage(url), f"overhead-{uuid.uuid4().hex[:8]}"

    def empty(trial: optuna.Trial) -> float:
        """Record what the objective function of a sweep records, and do nothing else."""
        chosen = sweep.suggest(trial, {})
        trial.set_user_attr("overrides", chosen)
        trial.set_user_attr("run", uuid.uuid4().hex)
        return float(chosen["x0"])

    optuna.create_study(study_name=name, storage=storage).set_metric_names(["x0"])
    try:
        study = load_study(name, storage, sweep, {})
        begin = time.perf_counter()
        plan(study, trials)
        planned = time.perf_counter()
        for _ in tqdm(range(trials), desc=f"{sampler} trials", unit="trial", disable=None):
            study.optimize(empty, n_trials=1)
        ended = time.perf_counter()
    finally:
        optuna.delete_study(study_name=name, storage=storage)
    return {"seconds/plan": (planned - begin) / trials, "seconds/trial": (ended - planned) / trials}
