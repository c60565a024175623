"""One trial of a sweep: its runs, what it reports while they last, and its values."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import optuna
import torch

from pdiff.errors import Pruned, UserError
from pdiff.experiment import config, stages
from pdiff.experiment.schema import Experiment
from pdiff.method.log import Point
from pdiff.sweeps.launchers import abandoned
from pdiff.sweeps.schema import FIRST, Objective, Sweep, as_text
from pdiff.sweeps.search import Study
from pdiff.sweeps.storage import PATIENCE, open_storage, without_password
from pdiff.tracking import engine, runs, store

# What a trial leaves out: test images, groups that no objective looks at, and models that nobody will serve.
CHEAP = {"evaluate.noise": "[]", "evaluate.baselines": "[]", "log_models": "false"}
UNTESTED = {"evaluate.test": "false"}


class Order(NamedTuple):
    """What all workers of a study must know; kept in the study itself."""

    tag: str
    overrides: dict[str, str]
    sweep: dict[str, Any]
    storage: str
    run: str

    @property
    def fixed(self) -> dict[str, str]:
        """Configuration key -> value as text, of every trial."""
        return {key: as_text(value) for key, value in self.sweep["set"].items()} | self.overrides


class Lost(BaseException):
    """A trial was taken for dead, and somebody else has begun it again."""


class Judge:
    """Listens to the stages of a trial: reports the metric of the pruner, and ends what is not worth going on with.

    Optuna's pruners follow the direction of the objective; a metric of the other direction is reported negated.
    """

    def __init__(self, trial: optuna.Trial, sweep: Sweep) -> None:
        self.trial, self.sweep = trial, sweep
        objective = next(iter(sweep.objectives.values()))
        self.sign = 1 if objective.direction == sweep.pruner.direction else -1

    def __call__(self, point: Point) -> None:
        """Hear one point.

        Raises:
            Pruned: it says that the trial is not worth going on with.
            KeyboardInterrupt: the process that started this worker is gone.
        """
        if abandoned():
            raise KeyboardInterrupt
        self.check(point)
        pruner = self.sweep.pruner
        if pruner.kind != "none" and point.name == pruner.metric:
            self.trial.report(self.sign * point.value, point.step)
            if self.trial.should_prune():
                raise Pruned(f"{pruner.kind} pruner: {point.name} is {point.value:.4g} at step {point.step}")

    def check(self, point: Point) -> None:
        """End the trial at a gate that does not let a point pass."""
        for gate in self.sweep.prune_if:
            if gate.shut(*point):
                limit = f"below {gate.below:g}" if gate.below is not None else f"above {gate.above:g}"
                raise Pruned(f"prune_if: {point.name} is {point.value:.4g} at step {point.step}, {limit}")


def objective_value(name: str, objective: Objective, metrics: Mapping[str, float]) -> float:
    """The value of an objective.

    Raises:
        KeyError: a metric that no stage measures.
    """
    return sum(metrics[metric] for metric in objective.sum or (name,))


class Runner:
    """The objective that Optuna calls."""

    def __init__(self, study: Study, order: Order) -> None:
        self.study, self.order, self.sweep = study, order, study.sweep
        self.given = config.flat(config.load(order.tag, order.fixed))

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """Run a trial; whatever ends it early, it says why."""
        chosen = self.sweep.suggest(trial, self.given)
        trial.set_user_attr("overrides", chosen)
        try:
            return self._values(trial, self._experiment(chosen))
        except Pruned as reason:
            trial.set_user_attr("pruned", str(reason))
            raise optuna.TrialPruned(str(reason)) from None
        except KeyboardInterrupt:
            trial.set_user_attr("interrupted", True)
            raise
        except Exception as error:
            if store.is_away(error):  # not the trial's fault: it says no reason, and is begun again
                _await_tracking()
            else:
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise
        finally:
            if torch.cuda.is_initialized():  # what a failed trial held must not fail the next one
                gc.collect()
                torch.cuda.empty_cache()

    def _experiment(self, chosen: Mapping[str, str], **more: str) -> Experiment:
        """The experiment of a trial, or of a part of one.

        Raises:
            Pruned: the configuration refuses the combination.
        """
        try:
            return config.load(self.order.tag, CHEAP | self.order.fixed | dict(chosen) | more | UNTESTED)
        except UserError as error:
            raise Pruned(f"the configuration refuses it: {error}") from None

    def _values(self, trial: optuna.Trial, experiment: Experiment) -> tuple[float, ...]:
        """Run the stages of a trial, nested in its run, and take the objectives from their metrics."""
        tags = {
            "pdiff.study": self.study.study_name,
            "pdiff.trial": str(trial.number),
            "mlflow.note.content": (
                f"Trial {trial.number} of study {self.study.study_name} in {without_password(self.order.storage)}, "
                f"a run of the sweep {self.order.run}."
            ),
        }
        label = f"trial {trial.number}"
        with runs.around("trial", experiment, label=label, tags=tags, parent=self.order.run) as run_id:
            trial.set_user_attr("run", run_id)
            metrics = self._metrics(Judge(trial, self.sweep), experiment, trial.user_attrs["overrides"])
            values = self._objectives(metrics)
            runs.record(run_id, metrics=metrics, parameters={f"trial.{k}": v for k, v in trial.params.items()})
            self._still_ours(trial)
        return values

    def _metrics(self, judge: Judge, experiment: Experiment, chosen: Mapping[str, str]) -> dict[str, float]:
        """All metrics of a trial's stages, those of its first batch of networks among them."""
        metrics: dict[str, float] = {}
        pipeline = engine.Pipeline(experiment, store.MLflowStore())
        for stage in stages.of(experiment):
            if stage == "generate" and self.sweep.first_batch:
                part = self._experiment(chosen, **{"generate.count": str(self.sweep.first_batch)})
                done = engine.Pipeline(part, store.MLflowStore(), known=pipeline.known).execute("evaluate")
                metrics |= _heard(judge, {f"{FIRST}{name}": value for name, value in done.metrics.items()})
            with runs.listening(judge):
                done = pipeline.execute(stage)
            metrics |= _heard(judge, done.metrics)
        return metrics

    def _objectives(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The values of the objectives.

        Raises:
            UserError: a metric that no stage measures, which no other trial will have either; NaN.
        """
        values = []
        for name, objective in self.sweep.objectives.items():
            try:
                values.append(objective_value(name, objective, metrics))
            except KeyError as error:
                known = [metric for metric in metrics if not metric.startswith(("test_", "similarity/", "system/"))]
                reason = f"objectives.{name}: no stage measures {error}; {config.nearest(str(error.args[0]), known)}"
                self.study.set_user_attr("stopped", reason)
                raise UserError(reason) from None
            if math.isnan(values[-1]):
                raise UserError(f"objectives.{name} is NaN")
        return tuple(values)

    def _still_ours(self, trial: optuna.Trial) -> None:
        if self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            raise Lost(f"trial {trial.number} was begun again by another worker")


def _heard(judge: Judge, metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Final metrics, those of finished runs included, after a look at the gates."""
    for name, value in metrics.items():
        judge.check(Point(name, value))
    return metrics


def _await_tracking() -> None:
    """Wait until the tracking store answers."""
    end, pause = time.monotonic() + PATIENCE, 0.5
    while time.monotonic() < end:
        try:
            with store.connected():
                return
        except UserError:
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def order_of(study: optuna.Study, storage: str) -> Order:
    """What a study says of itself.

    Raises:
        UserError: it is not one of pdiff's.
    """
    try:
        return Order(**study.user_attrs["order"], storage=storage, run=study.user_attrs["run"])
    except KeyError:
        raise UserError(f"--study {study.study_name}: no sweep of pdiff's began it") from None


def attend(name: str, url: str) -> tuple[Study, Order]:
    """The study that this worker works on.

    Raises:
        UserError: there is none.
    """
    storage = open_storage(url, patient=True)
    try:
        plain = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        raise UserError(f"--study {name}: no such study in {without_password(url)}") from None
    order = order_of(plain, url)
    sweep = Sweep.model_validate(order.sweep)
    grid = sweep.grid(config.flat(config.load(order.tag, order.fixed))) if sweep.sampler.kind == "grid" else {}
    return Study(name, storage, sweep, grid), order
