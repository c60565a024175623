"""How a sweep searches: Optuna's samplers and pruners by name, and the study that uses them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.seeds import stream
from pdiff.sweeps.schema import Pruner, Sampler, Sweep
from pdiff.sweeps.storage import Storage

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)
Grid = Mapping[str, list[Any]]
REHEARSALS = 12  # trials; by then most samplers no longer sample at random
SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
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


class SeededSampler(BaseSampler):
    """Optuna's sampler, made anew for every trial, with the seed of that trial.

    The random numbers of a trial depend on the sweep's seed and the trial's number alone: no two workers sample the
    same parameters, and any number of workers samples what one would. `after_trial` is not passed on: it serves
    constraint functions, which a YAML file cannot hold, and ends `Study.optimize` where a grid is exhausted.
    """

    def __init__(self, settings: Sampler, grid: Grid) -> None:
        self.settings, self.grid = settings, grid
        self.sampler = make_sampler(settings, grid)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Make the sampler of a trial."""
        self.sampler = make_sampler(self.settings, self.grid, number=trial.number)
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that are sampled together."""
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of the parameters that are sampled together."""
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of a parameter that is sampled alone."""
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)


def make_sampler(settings: Sampler, grid: Grid, *, number: int = 0) -> BaseSampler:
    """The sampler of one trial.

    Raises:
        UserError: an option that the sampler does not have, or a value that it does not take.
    """
    if settings.kind in ("grid", "qmc"):  # one sequence, of which each trial takes an element
        options: dict[str, Any] = {"seed": settings.seed}
    else:
        options = {"seed": stream(settings.seed, number) % 2**32}
    if settings.kind == "grid":
        options["search_space"] = grid
    if settings.kind in ("gp", "cmaes", "qmc"):
        options["warn_independent_sampling"] = False
    return _make("sampler", SAMPLERS[settings.kind], options, settings.options)


def make_pruner(settings: Pruner) -> optuna.pruners.BasePruner:
    """The pruner that the settings name.

    Raises:
        UserError: an option that the pruner does not have, or a value that it does not take.
    """
    return _make("pruner", PRUNERS[settings.kind], {}, settings.options)


def rehearse(sweep: Sweep, grid: Grid, given: Mapping[str, Any]) -> None:
    """Make the sampler and the pruner of a sweep and, where they have options, use them in trials that run nothing.

    Args:
        sweep: whose options are tried.
        grid: see `Sweep.grid`.
        given: configuration key -> value of the experiment without a trial.

    Raises:
        UserError: an option that the sampler or the pruner does not have, or cannot work with.
    """
    directions = [objective.direction for objective in sweep.objectives.values()]
    sampler, pruner = SeededSampler(sweep.sampler, grid), make_pruner(sweep.pruner)
    options = {what: part.options for what, part in (("sampler", sweep.sampler), ("pruner", sweep.pruner))}
    tried = {what: given for what, given in options.items() if given}
    study = optuna.create_study(directions=directions, sampler=sampler, pruner=pruner)
    try:
        for number in range(REHEARSALS if tried else 0):
            trial = study.ask()
            sweep.suggest(trial, given)
            for step in range(3 if sweep.pruner.kind != "none" else 0):
                trial.report(number, step)
                trial.should_prune()
            study.tell(trial, [float(number)] * len(directions))
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        keys = " or ".join(f"{what}.options {values}" for what, values in tried.items())
        raise UserError(f"{keys}: Optuna cannot work with them: {' '.join(str(error).split())}") from error


def _make(what: str, kind: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]) -> Any:
    known = [name for name in inspect.signature(kind).parameters if name not in given]
    for name in options:
        if name not in known:
            raise UserError(f"{what}.options.{name}: unknown option; {config.nearest(name, known)}")
    try:
        return kind(**given, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}.options: {' '.join(str(error).split())}") from None


def load_study(name: str, storage: Storage, sweep: Sweep, grid: Grid) -> optuna.Study:
    """A study with the sampler and the pruner of its sweep.

    Raises:
        KeyError: there is no study of this name.
        UserError: options that Optuna does not take.
    """
    sampler, pruner = SeededSampler(sweep.sampler, grid), make_pruner(sweep.pruner)
    return optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
