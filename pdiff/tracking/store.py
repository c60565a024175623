"""The connection to MLflow's tracking store, and that store as the engine sees it."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import requests
from filelock import FileLock
from mlflow.entities import Run as Record
from mlflow.entities import RunStatus
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from tqdm.auto import tqdm

from pdiff.errors import Failure, UserError
from pdiff.experiment.schema import Experiment
from pdiff.method.log import Point
from pdiff.parallel.liveness import alive
from pdiff.tracking import database, interface
from pdiff.tracking.engine import Done, work_folder
from pdiff.tracking.runs import CONFIG_FILE, TrackedRun, artifacts, commit, local_artifacts, tracked

EXPERIMENT = "pdiff"
MISTAKES = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")  # MLflow's names of errors
LONGEST = 400  # characters of a message of MLflow, which may hold a whole page or statement


@contextmanager
def connected() -> Iterator[MLflowStore]:
    """Work with the tracking store; what fails in it becomes one line.

    Raises:
        UserError: MLflow says that it was asked for something impossible.
        Failure: a store that does not answer, cannot be written to, or fails.
    """
    try:
        connect()
        yield MLflowStore()
    except (mlflow.MlflowException, SQLAlchemyError, requests.RequestException, sqlite3.Error) as error:
        kind = UserError if getattr(error, "error_code", "") in MISTAKES else Failure
        reason = " ".join(str(error).strip().partition("\n")[0].split())[:LONGEST]  # then come statements and addresses
        raise kind(f"{database.place()}: {reason}") from None


@contextmanager
def existing() -> Iterator[bool]:
    """Work with the tracking store if there is one, and yield whether there is; a local one is not created.

    Raises:
        UserError: as `connected` does.
    """
    uri = mlflow.get_tracking_uri()
    file = make_url(uri).database if uri.startswith("sqlite:///") else None
    if file and not Path(file).exists():
        yield False
    else:
        with connected():
            yield True


def connect() -> None:
    """Reach the tracking store, creating a local one, and close runs whose process is dead.

    Raises:
        Failure: a server that does not answer; a place that cannot be written to.
    """
    for noisy in ("mlflow.system_metrics", "mlflow.store.db", "mlflow.tracking.fluent"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what matters is raised as well
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if not (sys.stdout and sys.stdout.isatty()):
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        database.reach()
        work_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(work_folder() / "store.lock"):
            if run_id := os.environ.get("MLFLOW_RUN_ID"):  # `mlflow run` has chosen the experiment
                experiment = mlflow.get_experiment(mlflow.get_run(run_id).info.experiment_id)
            else:
                experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)
            for name, value in interface.tags().items():
                if name not in experiment.tags:
                    mlflow.MlflowClient().set_experiment_tag(experiment.experiment_id, name, value)
            close_dead_runs()
    except OSError as error:
        raise Failure(f"{database.place()} or {work_folder()} cannot be written: {error}") from None
    mlflow.enable_system_metrics_logging()
    mlflow.set_system_metrics_sampling_interval(2)


def experiment_ids() -> list[str]:
    """All MLflow experiments of the store."""
    return [experiment.experiment_id for experiment in mlflow.search_experiments()]


def search(condition: str) -> list[Record]:
    """The runs of all MLflow experiments that meet a condition, the latest first."""
    order = ["attributes.start_time DESC"]
    return mlflow.search_runs(experiment_ids(), condition, output_format="list", order_by=order)


class MLflowStore:
    """MLflow as the store of the engine, see `pdiff.tracking.engine.Store`."""

    def find(self, tags: Mapping[str, str]) -> Done | None:
        """The latest finished run that has these tags and its artifacts, and does not stand for another one."""
        conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        found = search(" and ".join(["attributes.status = 'FINISHED'", *conditions]))
        return next((_done(run) for run in found if "pdiff.reused" not in run.data.tags and _is_whole(run)), None)

    @contextmanager
    def open(self, stage: str, experiment: Experiment, digest: str) -> Iterator[TrackedRun]:
        """A new run, nested in the active one."""
        with tracked(stage, experiment, digest=digest) as run:
            yield run

    def link(self, run_id: str) -> str:
        """Where MLflow's user interface shows a run."""
        return interface.run(mlflow.get_run(run_id))

    def table(self, run_id: str) -> str:
        """Where MLflow's user interface compares a run with all others, and what must be started for that."""
        return f"{'' if interface.is_served() else 'mlflow ui, then open '}{interface.table(mlflow.get_run(run_id))}"

    def reuse(self, stage: str, experiment: Experiment, done: Done) -> None:
        """Warn of a run that was made by other code; log its models, if this experiment wants them and the run has
        none; and if `mlflow run` began a run for this, note there which one it stands for."""
        made_by = done.tags.get("pdiff.commit", "unknown")
        if made_by not in (commit(), "unknown"):
            tqdm.write(f"warning: run {done.run_id} was made by commit {made_by}")
        if stage == "train" and (experiment.log_models or experiment.register):
            _complete_models(experiment, done)
        if "MLFLOW_RUN_ID" in os.environ and mlflow.active_run() is None:
            with tracked(stage, experiment, digest=done.tags["pdiff.digest"]) as run:
                run.tag({"pdiff.reused": done.run_id})
                for name, value in done.metrics.items():
                    run.log(Point(name, value))


def _done(record: Record) -> Done:
    metrics = {name: value for name, value in record.data.metrics.items() if not name.startswith("system/")}
    return Done(record.info.run_id, metrics, lambda: artifacts(record), record.data.tags)


def _is_whole(record: Record) -> bool:
    """Whether the artifacts of a run are there, as far as that is known without a server."""
    folder = local_artifacts(record)
    return folder is None or (folder / CONFIG_FILE).exists()


def _complete_models(experiment: Experiment, done: Done) -> None:
    """Log and register the models of a finished run of `train` as far as that was not done."""
    condition = f"name = 'generator' and source_run_id = '{done.run_id}'"
    logged = mlflow.search_logged_models(experiment_ids(), condition, output_format="list")
    name = f"pdiff-{experiment.tag}"
    if not logged:
        from pdiff.tracking import models  # imports torch

        with mlflow.start_run(done.run_id, nested=True):
            models.log(experiment, done.folder / "generator")
    elif experiment.register and done.run_id not in {
        version.run_id for version in mlflow.search_model_versions(filter_string=f"name = '{name}'")
    }:
        from pdiff.tracking import models

        models.register(logged[0].model_uri, name)


def close_dead_runs() -> None:
    """Mark runs as KILLED that are RUNNING by their record, but whose process is gone."""
    for record in search("attributes.status = 'RUNNING'"):
        process = record.data.tags.get("pdiff.process")
        if process and not alive(process):
            mlflow.MlflowClient().set_terminated(record.info.run_id, RunStatus.to_string(RunStatus.KILLED))


def address() -> str:
    """Where the tracking store is."""
    return mlflow.get_tracking_uri()


def move(run_ids: Sequence[str], parent: str) -> None:
    """Nest runs in another parent."""
    for run_id in run_ids:
        mlflow.MlflowClient().set_tag(run_id, "mlflow.parentRunId", parent)


def disown(run_ids: Sequence[str]) -> None:
    """Mark runs as KILLED, even if they are FINISHED by their record: their process died before their trial ended."""
    for run_id in run_ids:
        mlflow.MlflowClient().set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))


def is_away(error: BaseException) -> bool:
    """Whether an error means that the tracking store does not answer, not that the request was wrong."""
    code = getattr(error, "error_code", "")
    return isinstance(error, mlflow.MlflowException | requests.RequestException) and (
        code in ("", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED")
    )


def named(run_id: str) -> Record:
    """The run that an id names, or the beginning of one.

    Raises:
        UserError: there is no such run, or there are several.
    """
    if not re.fullmatch("[0-9a-f]{1,32}", run_id):
        raise UserError(f"--run {run_id}: expected the id of a run or its beginning, at most 32 of the digits 0-9, a-f")
    found = search(f"attributes.run_id LIKE '{run_id}%'")
    if not found:
        raise UserError(f"--run {run_id}: no such run in the tracking store")
    if len(found) > 1:
        shown = ", ".join(f"{run.info.run_id[:12]} ({run.info.run_name})" for run in found[:4])
        raise UserError(f"--run {run_id}: {len(found)} runs begin like this, expected one, such as {shown}")
    return found[0]


def artifacts_of(run_id: str) -> tuple[Path, dict[str, Any]]:
    """The artifacts and tags of a run, or of the one that it stands for; see `named`.

    Raises:
        Damaged: an artifact is missing or changed.
    """
    record = named(run_id)
    tags = record.data.tags
    if reused := tags.get("pdiff.reused"):
        return artifacts_of(reused)
    remedy = f"`pdiff {tags.get('pdiff.stage')} --tag {tags.get('pdiff.tag')} --fresh` makes it again"
    return replace(_done(record), remedy=lambda: remedy).folder, tags
