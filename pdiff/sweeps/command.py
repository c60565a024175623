"""What a user asks for with `pdiff sweep`, and whether it can be done; neither torch nor MLflow is imported for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from pdiff.errors import UserError
from pdiff.experiment import config, limits, stages
from pdiff.experiment.keys import all_keys
from pdiff.experiment.schema import Experiment
from pdiff.sweeps import schema
from pdiff.sweeps.schema import Parameter, Sweep
from pdiff.sweeps.search import Grid, make_pruner, make_sampler
from pdiff.sweeps.storage import default_storage
from pdiff.tracking.engine import work_folder

REHEARSALS = 20  # random trials, of which the configuration must accept one


@dataclass(frozen=True)
class Command:
    """A sweep as the user asks for it.

    Args:
        tag: an experiment.
        sweep: the name of a sweep, or a path to its YAML file.
        overrides: configuration key -> value as text, for all trials.
        trials: of the whole study; 0 for the number in the sweep's file.
        workers: that this command starts, at most.
        storage: see `open_storage`.
        study: its name; by default made of sweep and tag.
        launcher: an entry of `LAUNCHERS`.
        options: of the launcher.
    """

    tag: str
    sweep: str
    overrides: dict[str, str] = field(default_factory=dict)
    trials: int = 0
    workers: int = 1
    storage: str = field(default_factory=default_storage)
    study: str = ""
    launcher: str = "processes"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the study."""
        return self.study or f"{Path(self.sweep).stem}-{Path(self.tag).stem}"


class Checked(NamedTuple):
    """A sweep without mistakes, the experiment without a trial, and the values of a grid, if it searches one."""

    sweep: Sweep
    experiment: Experiment
    grid: Grid


def check(command: Command) -> Checked:
    """Find every mistake that can be found before the first trial.

    Raises:
        UserError: where it is, and what was expected.
    """
    config.load(command.tag, command.overrides)
    sweep, path = schema.load(command.sweep), str(schema.find(command.sweep))
    fixed = sweep.fixed(command.overrides)
    experiment = _experiment(sweep, command.tag, fixed, path)
    limits.check(experiment, stages.of(experiment), work_folder())
    given = config.flat(experiment)
    try:
        grid = sweep.grid(given) if sweep.sampler.kind == "grid" else {}
        make_sampler(sweep.sampler, grid)
        make_pruner(sweep.pruner)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    rehearsal, refused = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), []
    for _ in range(REHEARSALS):
        try:
            config.load(command.tag, fixed | sweep.suggest(rehearsal.ask(), given), origin=path)
            return Checked(sweep, experiment, grid)
        except UserError as error:
            refused.append(str(error))
    raise UserError(f"every trial would be refused, such as: {refused[0]}")


def _experiment(sweep: Sweep, tag: str, given: dict[str, str], path: str) -> Experiment:
    """The experiment of a sweep without a trial.

    Raises:
        UserError: keys that no configuration has, values that it never takes, no parameter that applies.
    """
    base = config.load(tag, given, origin=path)
    known, keys = config.flat(base), all_keys()
    problems, searched = [], False
    for parameter_name, parameter in sweep.parameters.items():
        for key in parameter.when.keys() - sweep.parameters.keys() - set(keys):
            problems.append(f"{path}: parameters.{parameter_name}.when: {config.nearest(key, keys)}")
        for key in set(parameter.keys or (parameter_name,)) - set(keys):
            problems.append(f"{path}: {key}: unknown key; {config.nearest(key, keys)}")
        if (where := sweep.context(parameter, known)) is not None:
            searched = True
            problems += _refused(parameter_name, parameter, tag, given | where, path)
    if not searched:
        conditions = {key: list(values) for p in sweep.parameters.values() for key, values in p.when.items()}
        problems.append(f"{path}: no parameter applies to {tag}; they are searched where {conditions}")
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return base


def _refused(name: str, parameter: Parameter, tag: str, given: dict[str, str], path: str) -> Iterator[str]:
    """Problems with single values of a parameter; those with combinations are left to the trials."""
    for value in parameter.extremes():
        chosen = parameter.settings(name, value)
        for problem in config.problems(tag, given | chosen, origin=path):
            if any(problem.startswith(f"{path}: {key}: ") for key in chosen):
                yield problem
