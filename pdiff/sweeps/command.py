"""What a user asks for with `pdiff sweep`, and whether it can be done; neither torch nor MLflow is imported for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from pdiff.errors import UserError
from pdiff.experiment import config, documents, limits, metrics, stages
from pdiff.experiment.keys import all_keys
from pdiff.experiment.schema import Experiment
from pdiff.sweeps import schema
from pdiff.sweeps.launchers import launcher
from pdiff.sweeps.schema import FIRST, Parameter, Sweep
from pdiff.sweeps.search import Grid, load_study, rehearse
from pdiff.sweeps.storage import default_storage, exists, open_storage, without_password
from pdiff.tracking.engine import work_folder

REHEARSALS = 20  # random trials, of which the configuration must accept one
# What a trial leaves out: test images, groups that no objective looks at, and logged models.
CHEAP = {"evaluate.noise": "[]", "evaluate.baselines": "[]", "log_models": "false"}
UNTESTED = {"evaluate.test": "false"}


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

    @property
    def folder(self) -> Path:
        """Where logs of its workers, and files of its report, are."""
        return work_folder() / "sweeps" / self.name


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
    if command.workers < 1:
        raise UserError(f"workers {command.workers}: expected a positive number")
    if command.trials < 0:
        raise UserError(f"trials {command.trials}: expected a positive number, or 0 for that of the sweep")
    config.load(command.tag, command.overrides)
    sweep, path = schema.load(command.sweep), str(schema.find(command.sweep))
    fixed = sweep.fixed(command.overrides)
    experiment = _experiment(sweep, command.tag, fixed, path)
    if experiment.audit:
        raise UserError(f"{command.tag}: audit: nothing is fitted, so that there is nothing to search")
    limits.check(experiment, stages.of(experiment), work_folder())
    given = config.flat(experiment)
    try:
        grid = sweep.grid(given) if sweep.sampler.kind == "grid" else {}
        rehearse(sweep, grid, given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    _rehearse_trials(sweep, command.tag, fixed, given, path)
    checked = Checked(sweep, experiment, grid)
    launcher(command.launcher, command.workers, command.folder, command.options, pinned=False)
    if exists(command.storage):
        with suppress(KeyError):  # there is no study of this name
            study = load_study(command.name, open_storage(command.storage), sweep, grid)
            refuse_other_settings(command, checked, study)
    return checked


def _rehearse_trials(sweep: Sweep, tag: str, fixed: dict[str, str], given: Mapping[str, Any], path: str) -> None:
    """Check a few random trials, without running them.

    Raises:
        UserError: the configuration refuses all of them; none of them logs a metric that the sweep looks at.
    """
    study, refused, logged = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), [], set()
    for _ in range(REHEARSALS):
        try:
            chosen = fixed | sweep.suggest(study.ask(), given)
            logged |= _logged(sweep, config.load(tag, of_trial(given, chosen), origin=path))
        except UserError as error:
            refused.append(str(error))
        if logged.issuperset(metric for _, metric in sweep.watched()):
            return
    if not logged:
        raise UserError(f"every trial would be refused, such as: {refused[0]}")
    key, metric = next((key, metric) for key, metric in sweep.watched() if metric not in logged)
    hint = config.nearest(metric, sorted(name for name in logged if not metrics.on_test(name)))
    raise UserError(f"{path}: {key}: no stage of a trial logs {metric}; {hint}")


def of_trial(given: Mapping[str, Any], chosen: Mapping[str, str]) -> dict[str, str]:
    """The configuration of a trial as key -> text, beside its experiment's.

    Args:
        given: configuration key -> value of the experiment without a trial.
        chosen: what is set in this trial.
    """
    return CHEAP | dict(chosen) | (UNTESTED if given["evaluate.kind"] == "images" else {})


def _logged(sweep: Sweep, trial: Experiment) -> set[str]:
    """The metrics that a trial may have, those of its first batch of networks among them."""
    logged = {name: stages.STAGES[name].logs(trial) for name in stages.of(trial)}
    first = [f"{FIRST}{name}" for name in logged["evaluate"] if sweep.first_batch]
    return {*first, *itertools.chain.from_iterable(logged.values())}


def searched(checked: Checked) -> dict[str, Any]:
    """What a study searches: settings that cannot change while it goes on."""
    dumped = checked.sweep.model_dump(mode="json")
    found = {name: dumped[name] for name in ("objectives", "parameters", "set", "prune_if", "first_batch")}
    return found | {"experiment": stages.all_digests(checked.experiment)["evaluate"]}


def refuse_other_settings(command: Command, checked: Checked, study: optuna.Study) -> None:
    """Compare a study with what it was begun with.

    Raises:
        UserError: it searches something else.
    """
    now = searched(checked)
    before = study.user_attrs.get("searched", now)
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise UserError(
            f"study {command.name} in {without_password(command.storage)} was begun with other settings "
            f"({', '.join(changed)}); --study NAME begins another one"
        )


def _experiment(sweep: Sweep, tag: str, given: dict[str, str], path: str) -> Experiment:
    """The experiment of a sweep without a trial.

    Raises:
        UserError: keys that no configuration has, values that it never takes, no parameter that applies.
    """
    base = config.load(tag, given, origin=path)
    known, keys = config.flat(base), all_keys()
    problems, searched = [], False
    for parameter_name, parameter in sweep.parameters.items():
        for key, wanted in parameter.when.items():
            where = f"parameters.{parameter_name}.when.{key}"
            if key not in (*sweep.parameters, *keys):
                problems.append(f"{path}: {where}: unknown; {config.nearest(key, [*sweep.parameters, *keys])}")
            for value in wanted if key in known and not sweep.setters(key) else ():
                problems += _about(key, tag, given | {key: documents.as_text(value)}, path, where=where)
        for key in set(parameter.keys or (parameter_name,)) - set(keys):
            problems.append(f"{path}: {key}: unknown key; {config.nearest(key, keys)}")
        if (where := sweep.context(parameter, known)) is not None:
            searched = True
            problems += _refused(parameter_name, parameter, tag, given | where, path)
    if not searched and not problems:
        conditions = {key: list(values) for p in sweep.parameters.values() for key, values in p.when.items()}
        problems.append(f"{path}: no parameter applies to {tag}; they are searched where {conditions}")
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return base


def _refused(name: str, parameter: Parameter, tag: str, given: dict[str, str], path: str) -> Iterator[str]:
    """Problems with single values of a parameter; those with combinations are left to the trials."""
    for value in parameter.extremes():
        chosen = parameter.settings(name, value)
        for key in chosen:
            yield from _about(key, tag, given | chosen, path)


def _about(key: str, tag: str, given: dict[str, str], path: str, *, where: str = "") -> list[str]:
    """The problems of a configuration with one of its keys, as those of a place in the sweep's file."""
    found = [problem for problem in config.problems(tag, given, origin=path) if problem.startswith(f"{path}: {key}: ")]
    return [problem.replace(f"{path}: {key}: ", f"{path}: {where or key}: ", 1) for problem in found]
