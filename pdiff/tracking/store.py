"""TODO tracking.store."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import requests
from filelock import FileLock
from mlflow.entities import Run, RunStatus
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.rest_utils import http_request

from pdiff.errors import UserError
from pdiff.parallel.liveness import alive

EXPERIMENT = "pdiff"
SERVER_TIMEOUT = 5.0


def work_folder() -> Path:
    """Where unfinished stages keep what they have: the variable PDIFF_WORK, else `.pdiff` in the current folder."""
    return Path(os.environ.get("PDIFF_WORK", ".pdiff")).absolute()


@contextmanager
def connected() -> Iterator[None]:
    """Work with the tracking store; what fails in it becomes one line.

    Raises:
        UserError: a store that does not answer, cannot be written to, or fails.
    """
    try:
        connect()
        yield
    except mlflow.MlflowException as error:
        raise UserError(f"MLflow: {' '.join(str(error).split())}") from None


def connect() -> None:
    """Reach the tracking store, creating a local one, and close runs whose process is dead.

    Raises:
        UserError: a server that does not answer; a place that cannot be written to.
    """
    for noisy in ("mlflow.system_metrics", "mlflow.store.db", "mlflow.tracking.fluent"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        reach(uri)
    try:
        work_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(work_folder() / "store.lock"):
            if uri.startswith("sqlite:///"):
                with sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=60) as database:
                    database.execute("PRAGMA journal_mode=WAL")
            if "MLFLOW_RUN_ID" not in os.environ:
                mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)
            close_dead_runs()
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"the tracking store {uri} or {work_folder()} cannot be written: {error}") from None
    mlflow.enable_system_metrics_logging()
    mlflow.set_system_metrics_sampling_interval(2)


def reach(uri: str) -> None:
    """Ask a tracking server whether it is there, by the certificates and passwords that MLflow is told of.

    Raises:
        UserError: it does not answer.
    """
    try:
        http_request(get_default_host_creds(uri), "/health", "GET", timeout=SERVER_TIMEOUT, max_retries=0)
    except mlflow.MlflowException as error:
        reason = type(error.__context__ or error).__name__
        raise UserError(f"MLFLOW_TRACKING_URI {uri}: no answer ({reason})") from None


def _experiments() -> list[str]:
    return [experiment.experiment_id for experiment in mlflow.search_experiments()]


def _runs(condition: str) -> list[Run]:
    return mlflow.search_runs(_experiments(), condition, output_format="list", order_by=["attributes.start_time DESC"])


def close_dead_runs() -> None:
    """Mark runs as KILLED that are RUNNING by their record, but whose process is gone."""
    for run in _runs("attributes.status = 'RUNNING'"):
        process = run.data.tags.get("pdiff.process")
        if process and not alive(process):
            mlflow.MlflowClient().set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))


def _is_whole(run: Run) -> bool:
    """Whether the artifacts of a run lie where they should, as far as that can be told without a server."""
    uri = run.info.artifact_uri
    return urlparse(uri).scheme not in ("", "file") or (Path(local_file_uri_to_path(uri)) / "config.yaml").exists()


def _artifacts(run: Run) -> Path:
    """The artifacts of a run: in place in a local store, else downloaded once."""
    uri = run.info.artifact_uri
    if urlparse(uri).scheme in ("", "file"):
        return Path(local_file_uri_to_path(uri))
    target = work_folder() / "runs" / run.info.run_id
    if not target.exists():
        loading = target.with_name(f".{target.name}.{os.getpid()}")
        mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(loading))
        os.replace(loading, target)
    return target


def address() -> str:
    """Where the tracking store is."""
    return mlflow.get_tracking_uri()


def move(run_ids: Sequence[str], parent: str) -> None:
    """Nest runs in another parent."""
    for run_id in run_ids:
        mlflow.MlflowClient().set_tag(run_id, "mlflow.parentRunId", parent)


def disown(run_ids: Sequence[str]) -> None:
    """Mark runs as KILLED, also those that had just finished when their process died, before it could say so."""
    for run_id in run_ids:
        mlflow.MlflowClient().set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))


def is_away(error: BaseException) -> bool:
    """Whether an error says that the tracking store does not answer, and not that it was asked for nonsense."""
    code = getattr(error, "error_code", "")
    return isinstance(error, mlflow.MlflowException | requests.RequestException) and (
        code in ("", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED")
    )


def artifacts_of(run_id: str) -> tuple[Path, dict[str, Any]]:
    """The artifacts and tags of a run by its identifier.

    Raises:
        UserError: no such run.
    """
    try:
        run = mlflow.get_run(run_id)
    except mlflow.MlflowException as error:
        raise UserError(f"--run: {error.message.splitlines()[0]}") from None
    if reused := run.data.tags.get("pdiff.reused"):
        return artifacts_of(reused)
    return _artifacts(run), run.data.tags
