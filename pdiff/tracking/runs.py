"""TODO tracking.runs."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, Run, RunStatus
from mlflow.utils.git_utils import get_git_commit

from pdiff.errors import Pruned
from pdiff.experiment import config, digests
from pdiff.experiment.schema import Experiment
from pdiff.experiment.stages import STAGES
from pdiff.method.log import Log, Point
from pdiff.parallel.liveness import this_process

BATCH = 100  # metrics or parameters sent at a time
BATCH_SECONDS = 5.0
CONFIG = "config."  # before the names of the parameters that are keys of the configuration
PARAMETER_LIMIT = 6000  # characters; MLflow cuts longer values silently


_inherited: ContextVar[dict[str, str]] = ContextVar("inherited", default={})  # noqa: B039 (never changed in place)
_listener: ContextVar[Log] = ContextVar("listener", default=lambda point: None)


@contextmanager
def listening(log: Log) -> Iterator[None]:
    """Tell a log everything that the stages in the block tell their runs; it may raise `Pruned` to end them."""
    token = _listener.set(log)
    try:
        yield
    finally:
        _listener.reset(token)


class RunLog:
    """Points to a run, in batches, and to who is listening."""

    def __init__(self, run_id: str) -> None:
        self.run_id, self.client, self.pending, self.sent = run_id, mlflow.MlflowClient(), [], time.monotonic()

    def __call__(self, point: Point) -> None:
        self.pending.append(Metric(point.name, float(point.value), int(time.time() * 1000), point.step))
        if len(self.pending) >= BATCH or time.monotonic() - self.sent > BATCH_SECONDS:
            self.flush()
        _listener.get()(point)

    def flush(self) -> None:
        """Send what is pending."""
        if self.pending:
            self.client.log_batch(self.run_id, metrics=self.pending)
        self.pending, self.sent = [], time.monotonic()


@contextmanager
def _run(
    stage: str,
    experiment: Experiment | None = None,
    digest: str = "",
    *,
    label: str = "",
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """A run with its tags and parameters, if it is one of an experiment; nested in the active one, or in another
    process's `parent`; closed as what it ended as."""
    tags = {
        **_inherited.get(),
        **(tags or {}),
        "pdiff.stage": stage,
        **({"pdiff.tag": experiment.tag, "pdiff.digest": digest} if experiment else {}),
        "pdiff.process": this_process(),
        "pdiff.commit": commit(),
        "pdiff.interpreter": sys.executable,
    }
    nested = mlflow.active_run() is not None
    name = f"{experiment.tag} {label or stage}" if experiment else stage
    run = mlflow.start_run(run_name=name, nested=nested, parent_run_id=parent, tags=tags)
    status = RunStatus.FINISHED
    try:
        if not nested:
            _name_project_run(run, name)
        if experiment:
            _log_config(run, experiment)
        yield run
    except BaseException as error:
        status = RunStatus.FAILED if isinstance(error, Exception) else RunStatus.KILLED
        reason = "pdiff.pruned" if isinstance(error, Pruned) else "pdiff.error"
        mlflow.set_tag(reason, str(error)[:PARAMETER_LIMIT] or type(error).__name__)
        raise
    finally:
        mlflow.end_run(RunStatus.to_string(status))


def _log_config(run: Run, experiment: Experiment) -> None:
    """The complete configuration, as parameters `config.*` and as an artifact."""
    parameters = [Param(f"{CONFIG}{k}", str(v)[:PARAMETER_LIMIT]) for k, v in config.flat(experiment).items()]
    for start in range(0, len(parameters), BATCH):
        mlflow.MlflowClient().log_batch(run.info.run_id, params=parameters[start : start + BATCH])
    mlflow.log_text(config.to_yaml(experiment), "config.yaml")


def _name_project_run(run: Run, name: str) -> None:
    """Give a run that `mlflow run` began a telling name, unless its user chose one."""
    if re.fullmatch(r"[a-z]+-[a-z]+-\d+", run.info.run_name or ""):
        mlflow.set_tag("mlflow.runName", name)


@cache
def commit() -> str:
    """The git commit of this code when it was first asked for, or "unknown"."""
    return get_git_commit(str(Path(__file__).parent)) or "unknown"


def _copy_metrics(run_id: str, metrics: dict[str, float]) -> None:
    """Set final metrics on another run."""
    log = RunLog(run_id)
    for name, value in metrics.items():
        if not name.startswith("system/"):
            log(Point(name, value))
    log.flush()


@contextmanager
def around(
    kind: str,
    experiment: Experiment | None = None,
    *,
    label: str = "",
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> Iterator[str]:
    """A run of no stage, which may be around others, such as a sweep or a trial; yields its identifier.

    Args:
        kind: what takes the place of a stage in its tags.
        experiment: the configuration to log, if it is a run of one.
        label: what its name says beside the tag.
        tags: more tags; those of pdiff are also given to the runs in it.
        parent: a run of another process in which it is nested.
    """
    if parent:
        mlflow.set_experiment(experiment_id=mlflow.get_run(parent).info.experiment_id)
    tags, digest = tags or {}, digests.digest(experiment, STAGES["evaluate"].sections) if experiment else ""
    with _run(kind, experiment, digest, label=label, parent=parent, tags=tags) as run:
        token = _inherited.set({name: value for name, value in tags.items() if name.startswith("pdiff.")})
        try:
            yield run.info.run_id
        finally:
            _inherited.reset(token)


def record(
    run_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    files: Mapping[Path, str] | None = None,
) -> None:
    """Add to a run; `files` are path -> name of the folder of artifacts that gets it, "" for the top."""
    client = mlflow.MlflowClient()
    _copy_metrics(run_id, dict(metrics or {}))
    client.log_batch(run_id, params=[Param(k, str(v)[:PARAMETER_LIMIT]) for k, v in (parameters or {}).items()])
    for name, value in (tags or {}).items():
        client.set_tag(run_id, name, value)
    for path, folder in (files or {}).items():
        client.log_artifact(run_id, str(path), folder or None)
