"""Studies of a small sweep, without an experiment: what the tests of storages, samplers and trials share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import optuna

from pdiff.sweeps import search
from pdiff.sweeps.schema import Sweep
from pdiff.sweeps.storage import QueueEmpty, Storage

PARAMETERS = {
    "x": {"kind": "float", "low": -1, "high": 1, "step": 0.125},
    "n": {"kind": "int", "low": 1, "high": 3},
}


def small_sweep(*, sampler="random", pruner=None, objectives=("value",), **options) -> Sweep:
    """A sweep over `PARAMETERS`; `options` are those of the sampler."""
    return Sweep.model_validate(
        {
            "objectives": dict.fromkeys(objectives, "minimize"),
            "parameters": PARAMETERS,
            "sampler": {"kind": sampler, "options": options},
            "pruner": pruner or {},
        }
    )


def made(storage: Storage, *, name="s", **settings) -> optuna.Study:
    """A study of `small_sweep` as a worker loads it, created where there is none."""
    sweep = small_sweep(**settings)
    directions = ["minimize"] * len(sweep.objectives)
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    study.set_metric_names(list(sweep.objectives))
    return search.load_study(name, storage, sweep, sweep.grid({}) if sweep.sampler.kind == "grid" else {})


def in_memory() -> Storage:
    return Storage(optuna.storages.InMemoryStorage())


def suggest(trial: optuna.Trial) -> dict[str, str]:
    """The parameters of a trial, as text."""
    return small_sweep().suggest(trial, {})


def objective(study: optuna.Study) -> Callable[[optuna.Trial], tuple[float, ...]]:
    """(x - 0.5)^2 + n, and x beside it where there are two objectives."""

    def value(trial):
        chosen = {key: float(text) for key, text in suggest(trial).items()}
        values = ((chosen["x"] - 0.5) ** 2 + chosen["n"], chosen["x"])
        return values[: len(study.directions)]

    return value


def exhaust(study: optuna.Study) -> None:
    """Run all trials that wait."""
    with contextlib.suppress(QueueEmpty):
        study.optimize(objective(study))
    assert "WAITING" not in states(study)


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials()]
