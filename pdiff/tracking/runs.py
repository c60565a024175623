"""Runs of MLflow: tags, the configuration as parameters, metrics in batches, artifacts."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.entities import Run as Record
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.git_utils import get_git_commit

from pdiff.errors import Pruned
from pdiff.experiment import config, stages
from pdiff.experiment.schema import Experiment
from pdiff.files import read_json
from pdiff.method.log import Log, Point
from pdiff.parallel.interrupts import uninterrupted
from pdiff.parallel.liveness import this_process
from pdiff.tracking.engine import VERDICT, Done, work_folder
from pdiff.tracking.notes import NOTE, answers, note

BATCH = 100  # metrics or parameters sent at a time
BATCH_SECONDS = 5.0
CONFIG = "config."  # before the names of the parameters that are keys of the configuration
CONFIG_FILE = "config.yaml"  # the artifact that every run of an experiment has
LINKED_BYTES = 16 << 20  # of a file from which on a local store gets a link to it: such files are written once
PARAMETER_LIMIT = 6000  # characters; MLflow cuts longer values silently

_inherited: ContextVar[dict[str, str]] = ContextVar("inherited", default={})  # noqa: B039 (never changed in place)
_listener: ContextVar[Log] = ContextVar("listener", default=lambda point: None)


@contextmanager
def listening(log: Log) -> Iterator[None]:
    """Pass all points of the runs in the block on to a log, too; it may raise `Pruned` to end them."""
    token = _listener.set(log)
    try:
        yield
    finally:
        _listener.reset(token)


class TrackedRun:
    """An MLflow run in progress, see `pdiff.tracking.engine.Run`; points and tags are sent in batches."""

    def __init__(self, record: Record, stage: str, experiment: Experiment | None = None) -> None:
        self.run_id, self.record, self.stage, self.experiment = record.info.run_id, record, stage, experiment
        self.client, self.sent = mlflow.MlflowClient(), time.monotonic()
        self.latest: dict[str, Point] = {}
        self.times: dict[str, int] = {}  # of each metric, when it was last logged, in milliseconds
        self.points: list[Metric] = []
        self.tags: list[RunTag] = []

    def log(self, point: Point) -> None:
        """Record a point, and pass it on to the log that is listening."""
        if point.name not in self.latest or point.step >= self.latest[point.name].step:
            self.latest[point.name] = point
        # A logged model gets copies of metrics, of which MLflow takes no two with the same step and time.
        self.times[point.name] = max(int(time.time() * 1000), self.times.get(point.name, 0) + 1)
        self.points.append(Metric(point.name, float(point.value), self.times[point.name], point.step))
        if len(self.points) >= BATCH or time.monotonic() - self.sent > BATCH_SECONDS:
            self.flush()
        _listener.get()(point)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Record tags, which are sent with the next points."""
        self.tags += [RunTag(name, value) for name, value in tags.items()]

    def flush(self) -> None:
        """Send what is pending."""
        if self.points or self.tags:
            with uninterrupted():
                self.client.log_batch(self.run_id, metrics=self.points, tags=self.tags)
        self.points, self.tags, self.sent = [], [], time.monotonic()

    def end(self, status: str) -> None:
        """Send what is pending, and close the run."""
        try:
            self.flush()
        finally:
            mlflow.end_run(status)

    def upload(self, paths: Iterable[Path]) -> None:
        """Keep files, and folders with what is in them, as artifacts; what MLflow has other places for, there, too."""
        for path in paths:
            if local := local_artifacts(self.record):
                _keep(path, local / path.name)
            else:
                self.client.log_artifact(self.run_id, str(path))
            if path.name == "dataset.json":
                described = read_json(path)
                source = CodeDatasetSource({"mlflow.source.name": f"pdiff.networks.datasets:{described['name']}"})
                dataset = MetaDataset(source, name=described["name"], digest=described["digest"])
                mlflow.log_input(dataset, context="training")
            elif path.name == VERDICT:
                verdict = path.read_text(encoding="utf-8")
                self.tag({NOTE: note(self.stage, self.experiment, verdict), "pdiff.verdict": answers(verdict)})
            elif path.name == "generator" and (self.experiment.log_models or self.experiment.register):
                from pdiff.tracking import models  # imports torch

                models.log(self.experiment, path)

    def done(self) -> Done:
        """The run with its latest metrics."""
        return Done(self.run_id, {name: p.value for name, p in self.latest.items()}, lambda: artifacts(self.record))


@contextmanager
def tracked(
    stage: str,
    experiment: Experiment | None = None,
    *,
    digest: str = "",
    label: str = "",
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[TrackedRun]:
    """A new run, nested in the active one or in another process's; closed as finished, failed, or killed.

    Args:
        stage: what is run.
        experiment: its configuration, if it runs one.
        digest: what decides its result.
        label: what its name says beside the tag of the experiment; the stage when absent.
        parent: a run of another process.
        tags: more tags.
    """
    about = {"pdiff.tag": experiment.tag, "pdiff.digest": digest} if experiment else {}
    described = {NOTE: note(stage, experiment)} if experiment and stage in ("main", *stages.STAGES) else {}
    process = {"pdiff.process": this_process(), "pdiff.commit": commit(), "pdiff.interpreter": sys.executable}
    tags = described | _inherited.get() | dict(tags or {}) | {"pdiff.stage": stage} | about | process
    nested = mlflow.active_run() is not None
    name = f"{experiment.tag} {label or stage}" if experiment else stage
    run, status, already_failed = None, RunStatus.FINISHED, nullcontext()
    try:
        with uninterrupted():
            started = mlflow.start_run(run_name=name, nested=nested, parent_run_id=parent, tags=tags)
            run = TrackedRun(started, stage, experiment)
        if not nested and re.fullmatch(r"[a-z]+-[a-z]+-\d+", run.record.info.run_name or ""):
            run.tag({"mlflow.runName": name})  # `mlflow run` began it, and its user chose no name
        if experiment:
            _log_config(run.run_id, experiment)
        yield run
    except BaseException as error:
        status = RunStatus.FAILED if isinstance(error, Exception) else RunStatus.KILLED
        reason = "pdiff.pruned" if isinstance(error, Pruned) else "pdiff.error"
        if run:
            run.tag({reason: str(error)[:PARAMETER_LIMIT] or type(error).__name__})
        already_failed = suppress(Exception)  # a store that fails as well is not what the user must read
        raise
    finally:
        if run:
            with uninterrupted(), already_failed:
                run.end(RunStatus.to_string(status))


def _log_config(run_id: str, experiment: Experiment) -> None:
    """The complete configuration, as parameters `config.*` and as an artifact."""
    client = mlflow.MlflowClient()
    parameters = [Param(f"{CONFIG}{k}", str(v)[:PARAMETER_LIMIT]) for k, v in config.flat(experiment).items()]
    with uninterrupted():
        for start in range(0, len(parameters), BATCH):
            client.log_batch(run_id, params=parameters[start : start + BATCH])
        client.log_text(run_id, config.to_yaml(experiment), CONFIG_FILE)


@cache
def commit() -> str:
    """The git commit of this code when it was first asked for, or "unknown"."""
    return get_git_commit(str(Path(__file__).parent)) or "unknown"


def artifacts(record: Record) -> Path:
    """The artifacts of a run: in place in a local store, else downloaded once."""
    if local := local_artifacts(record):
        return local
    target = work_folder() / "runs" / record.info.run_id
    if not target.exists():
        loading = target.with_name(f".{target.name}.{os.getpid()}")
        mlflow.artifacts.download_artifacts(run_id=record.info.run_id, dst_path=str(loading))
        os.replace(loading, target)
    return target


def _keep(path: Path, target: Path) -> None:
    """Put a file, or a folder with what is in it, into a folder of this machine; large files without copying them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, copy_function=_linked, dirs_exist_ok=True)
    else:
        _linked(path, target)


def _linked(source: str | Path, target: str | Path) -> None:
    """One more name of a large file, which nothing writes to again, or else a copy of it."""
    if os.stat(source).st_size >= LINKED_BYTES:
        Path(target).unlink(missing_ok=True)
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)


def local_artifacts(record: Record) -> Path | None:
    """Where the artifacts of a run lie on this machine, if the store is local."""
    uri = record.info.artifact_uri
    return Path(local_file_uri_to_path(uri)) if urlparse(uri).scheme in ("", "file") else None


@contextmanager
def around(
    kind: str,
    experiment: Experiment | None = None,
    *,
    label: str = "",
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> Iterator[str]:
    """A run of no stage, which may hold others, such as a sweep or a trial; yields its identifier.

    Args:
        kind: what takes the place of a stage in its tags.
        experiment: the configuration to log, if it is a run of one.
        label: what its name says beside the tag.
        tags: more tags; those of pdiff are also given to the runs in it.
        parent: a run of another process in which it is nested.
    """
    if parent:
        mlflow.set_experiment(experiment_id=mlflow.get_run(parent).info.experiment_id)
    digest = stages.all_digests(experiment)[stages.evaluation(experiment)] if experiment else ""
    with tracked(kind, experiment, digest=digest, label=label, parent=parent, tags=tags) as run:
        token = _inherited.set({name: value for name, value in (tags or {}).items() if name.startswith("pdiff.")})
        try:
            yield run.run_id
        finally:
            _inherited.reset(token)


def record(
    run_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    files: Mapping[Path, str] | None = None,
) -> None:
    """Add to a run; `files` are path -> name of the folder of artifacts that gets it, "" for the top."""
    client, now = mlflow.MlflowClient(), int(time.time() * 1000)
    values = [Metric(name, float(value), now, 0) for name, value in (metrics or {}).items()]
    given = [Param(name, str(value)[:PARAMETER_LIMIT]) for name, value in (parameters or {}).items()]
    with uninterrupted():
        for start in range(0, max(len(values), len(given)), BATCH):
            part = slice(start, start + BATCH)
            client.log_batch(run_id, metrics=values[part], params=given[part])
    for path, folder in (files or {}).items():
        client.log_artifact(run_id, str(path), folder or None)
