"""What a worker does: run trials, each with the stages of its experiment, and in the end the best ones again."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import optuna
import pandas as pd
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from tqdm.auto import tqdm

from pdiff.errors import Pruned, UserError
from pdiff.experiment import config, stages
from pdiff.experiment.metrics import is_result, on_test
from pdiff.experiment.schema import Experiment
from pdiff.method.log import Point
from pdiff.sweeps.command import of_trial
from pdiff.sweeps.launchers import abandoned
from pdiff.sweeps.schema import FIRST, Sweep
from pdiff.sweeps.search import load_study
from pdiff.sweeps.storage import MAX_WAIT, QueueEmpty, exists, open_storage, without_password
from pdiff.sweeps.trials import best, heartbeats, is_late
from pdiff.tracking import engine, runs, store


class JobSpec(NamedTuple):
    """What all workers of a study need to know; the leader keeps it in the study itself."""

    tag: str
    overrides: dict[str, str]
    sweep: Sweep
    storage: str
    run: str

    @property
    def fixed(self) -> dict[str, str]:
        """Configuration key -> value as text, of every trial."""
        return self.sweep.fixed(self.overrides)


class StaleTrial(BaseException):
    """The trial was declared stale and is being retried by another worker."""


class PruningLog:
    """A log of the stages of a trial that ends the trial where a threshold or the pruner says so.

    Optuna's pruners follow the direction of the objective; a metric of the other direction is reported negated.
    """

    def __init__(self, trial: optuna.Trial, sweep: Sweep) -> None:
        self.trial, self.sweep = trial, sweep
        objective = next(iter(sweep.objectives.values()))
        self.sign = 1 if objective.direction == sweep.pruner.goal else -1

    def __call__(self, point: Point) -> None:
        """Take one point.

        Raises:
            Pruned: the trial is not worth continuing.
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
        """Raise Pruned where a point is beyond a threshold."""
        for threshold in self.sweep.prune_if:
            if threshold.prunes(*point):
                raise Pruned(f"prune_if: {point.name} is {point.value:.4g} at step {point.step}, {threshold}")

    def final(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Check the final metrics of a stage, which may have finished in an earlier run; returns them."""
        for name, value in metrics.items():
            self.check(Point(name, value))
        return metrics


class ObjectiveFunction:
    """The objective function of a study: trial -> values of the objectives."""

    def __init__(self, study: optuna.Study, job: JobSpec) -> None:
        self.study, self.job, self.sweep = study, job, job.sweep
        self.given = config.flat(config.load(job.tag, job.fixed))

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """Run the stages of a trial, nested in its run.

        Raises:
            Pruned: the trial is not worth continuing, or the configuration refuses its parameters.
            StaleTrial: it is another worker's now.
        """
        chosen = self.sweep.suggest(trial, self.given)
        trial.set_user_attr("overrides", chosen)
        experiment = self._experiment(chosen)
        name, number = self.study.study_name, trial.number
        note = f"Trial {number} of study {name} in {without_password(self.job.storage)}, a run of sweep {self.job.run}."
        tags = {"pdiff.study": name, "pdiff.trial": str(number), "mlflow.note.content": note}
        with runs.around("trial", experiment, label=f"trial {number}", tags=tags, parent=self.job.run) as run_id:
            trial.set_user_attr("run", run_id)
            metrics = self._metrics(PruningLog(trial, self.sweep), experiment, chosen)
            values = self._objectives(metrics)
            runs.record(run_id, metrics=metrics, parameters={f"trial.{k}": v for k, v in trial.params.items()})
            if self.study.get_trials(deepcopy=False)[number].state.is_finished():
                raise StaleTrial
        return values

    def _experiment(self, chosen: Mapping[str, str], **more: str) -> Experiment:
        """The experiment of a trial, or of a part of one."""
        try:
            return config.load(self.job.tag, of_trial(self.given, self.job.fixed | dict(chosen) | more))
        except UserError as error:
            raise Pruned(f"the configuration refuses it: {error}") from None

    def _metrics(self, log: PruningLog, experiment: Experiment, chosen: Mapping[str, str]) -> dict[str, float]:
        """All metrics of a trial's stages, those of its first batch of networks among them."""
        metrics: dict[str, float] = {}
        pipeline = engine.Pipeline(experiment, store.MLflowStore())
        for stage in stages.of(experiment):
            if stage == "generate" and self.sweep.first_batch:
                part = self._experiment(chosen, **{"generate.count": str(self.sweep.first_batch)})
                done = engine.Pipeline(part, store.MLflowStore(), known=pipeline.known).execute("evaluate")
                metrics |= log.final({f"{FIRST}{name}": value for name, value in done.metrics.items()})
            with runs.listening(log):
                done = pipeline.execute(stage)
            metrics |= log.final(done.metrics)
        return metrics

    def _objectives(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The values of the objectives.

        Raises:
            UserError: a metric that no stage measures, which no other trial will have either; NaN.
        """
        values = []
        for name, objective in self.sweep.objectives.items():
            try:
                values.append(sum(metrics[metric] for metric in objective.sum or (name,)))
            except KeyError as error:
                known = [metric for metric in metrics if not on_test(metric)]
                reason = f"objectives.{name}: no stage measures {error}; {config.nearest(str(error.args[0]), known)}"
                self.study.set_user_attr("stopped", reason)
                raise UserError(reason) from None
            if math.isnan(values[-1]):
                raise UserError(f"objectives.{name} is NaN")
        return tuple(values)


def run_trial(study: optuna.Study, function: Callable[[optuna.Trial], tuple[float, ...]]) -> None:
    """Take a waiting trial, run it, and record how it ended and why.

    Raises:
        QueueEmpty: no trial is waiting.
        KeyboardInterrupt: the worker was interrupted; its trial will be retried.
    """
    trial = study.ask()
    state, values = TrialState.FAIL, None

    def note(key: str, value: Any) -> None:
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr(key, value)

    with heartbeats(trial):
        try:
            values = function(trial)
            state = TrialState.COMPLETE
        except Pruned as reason:
            note("pruned", str(reason))
            state = TrialState.PRUNED
        except (StaleTrial, UpdateFinishedTrialError):
            tqdm.write(f"trial {trial.number} was declared stale and is being retried by another worker")
        except KeyboardInterrupt:
            note("interrupted", True)
            raise
        except Exception as error:
            if store.is_away(error):  # no fault of the trial: it records no error, and is retried
                _await_tracking()
            else:
                note("error", f"{type(error).__name__}: {error}")
        finally:
            with suppress(UpdateFinishedTrialError):  # by a call whose answer was lost
                study.tell(trial, values, state=state, skip_if_finished=True)
            _release_memory()


def _release_memory() -> None:
    """Return to the GPU what a failed trial held, or it would fail the next one."""
    torch = sys.modules.get("torch")  # imported by the stages, if one has run
    if torch and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _await_tracking() -> None:
    """Wait until the tracking store answers."""
    end, pause = time.monotonic() + MAX_WAIT, 0.5
    while time.monotonic() < end:
        try:
            with store.connected():
                return
        except UserError:
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def attend(name: str, url: str, *, wait: bool) -> tuple[optuna.Study, JobSpec]:
    """The study that a worker works on, and what its leader left there for workers.

    Raises:
        UserError: there is no such study, or no sweep began it.
    """
    try:
        if not wait and not exists(url):
            raise KeyError(name)
        storage = open_storage(url, wait=wait)
        attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
    except KeyError:
        raise UserError(f"--study {name}: no such study in {without_password(url)}") from None
    if "job" not in attributes:
        raise UserError(f"--study {name}: not begun by `pdiff sweep`")
    spec = attributes["job"]
    sweep = Sweep.model_validate(spec["sweep"])
    job = JobSpec(spec["tag"], spec["overrides"], sweep, url, attributes["run"])
    grid = sweep.grid(config.flat(config.load(job.tag, job.fixed))) if sweep.sampler.kind == "grid" else {}
    return load_study(name, storage, sweep, grid), job


def work(name: str, url: str, *, wait: bool = True) -> None:
    """Run trials of a study until none is waiting, its time is up, or it was stopped.

    Args:
        name: of the study.
        url: of its storage.
        wait: wait for a storage that does not answer.
    """
    study, job = attend(name, url, wait=wait)
    with store.connected(), suppress(QueueEmpty):
        function = ObjectiveFunction(study, job)
        while not (study.user_attrs["stopped"] or is_late(study) or abandoned()):
            run_trial(study, function)


def finish(name: str, url: str, *, wait: bool = True) -> None:
    """Run the best trials again with seeds that selected nothing, and evaluate on test images for the first time; the
    arguments are those of `work`."""
    study, job = attend(name, url, wait=wait)
    frames, final = [], job.sweep.final
    with store.connected():
        for trial in best(study, final.trials):
            overrides = job.fixed | trial.user_attrs["overrides"]
            experiment = config.load(job.tag, overrides)
            if experiment.evaluate.kind == "images":
                overrides |= {"evaluate.test": "true"}
                experiment = config.load(job.tag, overrides)
            tags = {"pdiff.study": name, "pdiff.trial": str(trial.number)}
            label = f"final of trial {trial.number}"
            with runs.around("final", experiment, label=label, tags=tags, parent=job.run) as run_id:
                metrics = _over_seeds(job.tag, overrides, experiment, final.seeds)
                runs.record(run_id, metrics=metrics["mean"].to_dict())
                runs.record(run_id, metrics={f"std/{key}": value for key, value in metrics["std"].items()})
            frames.append(metrics.rename_axis("metric").reset_index().assign(trial=trial.number))
    study.set_user_attr("final", pd.concat(frames).to_dict("records"))


def _over_seeds(tag: str, overrides: Mapping[str, str], experiment: Experiment, seeds: int) -> pd.DataFrame:
    """Metric -> mean and sample standard deviation over whole pipelines of new seeds."""
    columns = []
    for k in range(1, seeds + 1):
        new = {"seed": str(experiment.seed + k), "generate.seed": str(experiment.generate.seed + k)}
        metrics = engine.main(config.load(tag, {**overrides, **new}), store.MLflowStore()).metrics
        columns.append({name: value for name, value in metrics.items() if is_result(name)})
    frame = pd.DataFrame(columns)
    return pd.DataFrame({"mean": frame.mean(), "std": frame.std(ddof=1)})


ROLES: dict[str, Callable[..., None]] = {"trials": work, "final": finish}
