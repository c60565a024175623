"""The seam with MLflow: run a stage as a tracked run, find a finished one, log models."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sqlite3
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import mlflow
import numpy as np
import pandas as pd
import requests
import torch
from filelock import FileLock, Timeout
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, Run, RunStatus
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.git_utils import get_git_commit
from mlflow.utils.rest_utils import http_request
from tqdm.auto import tqdm

from pdiff import config, leaderboard
from pdiff.distributed import launch
from pdiff.errors import Pruned, UserError
from pdiff.files import copy_file, read_json
from pdiff.generator import Generator
from pdiff.leaderboard import Result
from pdiff.log import Log, Point
from pdiff.processes import alive, this_process
from pdiff.settings import Experiment
from pdiff.stages import HISTORY, STAGES, STATE, processes
from pdiff.training import resolve_device

EXPERIMENT = "pdiff"
BATCH = 100  # metrics or parameters sent at a time
BATCH_SECONDS = 5.0
CONFIG = "config."  # before the names of the parameters that are keys of the configuration
PARAMETER_LIMIT = 6000  # characters; MLflow cuts longer values silently
SERVER_TIMEOUT = 5.0
REQUIREMENTS = [f"{name}=={version(name)}" for name in ("torch", "diffusers", "mlflow")]  # of logged models


class Done(NamedTuple):
    """A finished run of a stage: where its artifacts are, and its metrics."""

    run_id: str
    folder: Path
    metrics: dict[str, float]


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


def _finished(*stages: str) -> list[Run]:
    """All finished runs of some stages, but not those of trials, the latest first."""
    found = [
        run for stage in stages for run in _runs(f"attributes.status = 'FINISHED' and tags.`pdiff.stage` = '{stage}'")
    ]
    own = [run for run in found if "pdiff.trial" not in run.data.tags]
    return sorted(own, key=lambda run: run.info.start_time, reverse=True)


def close_dead_runs() -> None:
    """Mark runs as KILLED that are RUNNING by their record, but whose process is gone."""
    for run in _runs("attributes.status = 'RUNNING'"):
        process = run.data.tags.get("pdiff.process")
        if process and not alive(process):
            mlflow.MlflowClient().set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))


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


def finished(stage: str, digest: str) -> Run | None:
    """The latest finished run of a stage with this digest whose artifacts are still there."""
    condition = (
        f"attributes.status = 'FINISHED' and tags.`pdiff.digest` = '{digest}' and tags.`pdiff.stage` = '{stage}'"
    )
    return _latest(condition)


def _latest(condition: str) -> Run | None:
    """The latest run that did something itself and whose artifacts are there."""
    return next((run for run in _runs(condition) if "pdiff.reused" not in run.data.tags and _is_whole(run)), None)


def _is_whole(run: Run) -> bool:
    """Whether the artifacts of a run lie where they should, as far as that can be told without a server."""
    uri = run.info.artifact_uri
    return urlparse(uri).scheme not in ("", "file") or (Path(local_file_uri_to_path(uri)) / "config.yaml").exists()


def execute(stage: str, experiment: Experiment, *, fresh: bool = False, known: dict[str, Done] | None = None) -> Done:
    """Run a stage after what it reads, each as a run; or reuse a finished one, and say so.

    Two processes that want the same stage do not do it twice: the second waits for the first.

    Args:
        stage: a name in `STAGES`.
        experiment: what it shall do.
        fresh: repeat this stage though it is finished.
        known: stages of this experiment that are done, to which this one and what it reads are added.
    """
    known = {} if known is None else known
    digest = config.digest(experiment, STAGES[stage].sections)
    with _exclusively(digest, f"{stage} of {experiment.tag}"):
        found = None if fresh else finished(stage, digest)
        if fresh:
            shutil.rmtree(work_folder() / digest, ignore_errors=True)
        if found:
            known[stage] = _reuse(found, stage, experiment)
        else:
            known[stage] = _perform(stage, experiment, digest, known, fresh=fresh)
        if stage == "train" and experiment.register:
            _register(known[stage].run_id, f"pdiff-{experiment.tag}")
    return known[stage]


def _register(run_id: str, name: str) -> None:
    """Register the generator of a run of train as a model, once."""
    versions = mlflow.search_model_versions(filter_string=f"name = '{name}'")
    if run_id not in {version.run_id for version in versions}:
        mlflow.register_model(f"runs:/{run_id}/generator", name)


@contextmanager
def _exclusively(digest: str, what: str) -> Iterator[None]:
    """Hold the lock of a digest; say so where one must wait."""
    lock = FileLock(work_folder() / f"{digest}.lock")
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        tqdm.write(f"{what}: another process is at it, waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _reuse(run: Run, stage: str, experiment: Experiment) -> Done:
    """Take a finished run's results; a run that `mlflow run` began for this tells whose they are."""
    tqdm.write(f"{stage}: reusing run {run.info.run_id} (--fresh repeats it)")
    _warn_of_commit(run)
    if stage == "train" and experiment.log_models and not mlflow.get_run(run.info.run_id).outputs.model_outputs:
        with mlflow.start_run(run.info.run_id, nested=True):
            _log_beside(stage, experiment, _artifacts(run))
    if "MLFLOW_RUN_ID" in os.environ and mlflow.active_run() is None:
        with _run(stage, experiment, run.data.tags["pdiff.digest"]) as own:
            mlflow.set_tag("pdiff.reused", run.info.run_id)
            _copy_metrics(own.info.run_id, run.data.metrics)
    return Done(run.info.run_id, _artifacts(run), run.data.metrics)


def _warn_of_commit(run: Run) -> None:
    """Say so where other code than this made a run."""
    if run.data.tags.get("pdiff.commit") not in (commit(), "unknown"):
        tqdm.write(f"warning: run {run.info.run_id} was made by commit {run.data.tags.get('pdiff.commit')}")


def _perform(stage: str, experiment: Experiment, digest: str, known: dict[str, Done], *, fresh: bool) -> Done:
    """Run a stage in its work folder, then upload what it wrote."""
    work = work_folder() / digest
    with _run(stage, experiment, digest) as run:
        reads = STAGES[stage].reads
        upstream = {name: known.get(name) or execute(name, experiment, known=known) for name in reads}
        mlflow.set_tags({f"pdiff.{name}_run": done.run_id for name, done in upstream.items()})
        tqdm.write(f"{stage}: run {run.info.run_id}" + (", resuming" if work.exists() else ""))
        _share(stage, experiment, work, upstream, fresh=fresh)
        log, compute = RunLog(run.info.run_id), STAGES[stage].run
        if (count := processes(stage, experiment)) > 1:
            compute = partial(launch, compute, processes=count, device=resolve_device(experiment.device))
        try:
            metrics = compute(experiment, work, log=log, **{name: done.folder for name, done in upstream.items()})
            for name, value in metrics.items():
                log(Point(name, value))
        except UserError:
            if not _has_results(stage, work):  # a mistake at the start, not an interruption
                shutil.rmtree(work, ignore_errors=True)
            raise
        except Pruned:  # nobody will ask for it again
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            log.flush()
        for path in sorted(work.iterdir()):
            if not path.name.startswith("."):  # neither the state, nor what a killed process left half-written
                mlflow.log_artifact(str(path))  # a folder with what is in it
        _log_beside(stage, experiment, work)
    shutil.rmtree(work)
    ended = mlflow.get_run(run.info.run_id)
    return Done(run.info.run_id, _artifacts(ended), ended.data.metrics)


def _has_results(stage: str, work: Path) -> bool:
    """Whether a stage has left anything to go on from: more than points of a log, and what it shares with others."""
    shared = STAGES[stage].shared
    given = {HISTORY} | ({path.name for path in (work / shared.name).glob("*")} if shared else set())
    return any(path.is_file() and path.name not in given for path in (work / STATE).rglob("*"))


def _share(stage: str, experiment: Experiment, work: Path, upstream: Mapping[str, Done], *, fresh: bool) -> None:
    """Tag a run with what a part of its result depends on, and take that part from a finished run of the same tag,
    unless all shall be `fresh`: what is collected may differ where the pretrained network does not."""
    shared = STAGES[stage].shared
    digest = shared.digest(experiment) if shared else ""
    if not digest:
        return
    value = " ".join([digest, *(upstream[name].run_id for name in shared.reads)])
    mlflow.set_tag(f"pdiff.{shared.name}", value)
    condition = f"attributes.status = 'FINISHED' and tags.`pdiff.{shared.name}` = '{value}'"
    found = None if fresh else _latest(condition)
    source = _artifacts(found) / shared.name if found else None
    if source and source.exists() and not (work / shared.name).exists():
        for path in sorted(source.iterdir()) if source.is_dir() else [source]:
            copy_file(path, work / path.relative_to(source.parent))
        tqdm.write(f"{stage}: {shared.name} of run {found.info.run_id} (--fresh does without)")
        _warn_of_commit(found)


def _log_beside(stage: str, experiment: Experiment, work: Path) -> None:
    """What MLflow has a place of its own for: data sets and models."""
    if stage == "prepare" and experiment.dataset:
        described = read_json(work / "dataset.json")
        source = CodeDatasetSource({"mlflow.source.name": f"pdiff.datasets:{described['name']}"})
        mlflow.log_input(MetaDataset(source, name=described["name"], digest=described["digest"]), context="training")
    if stage == "train" and experiment.log_models:
        _log_models(Generator.load(work / "generator"))
        _log_generator(experiment, work / "generator")


def _log_models(generator: Generator) -> None:
    """Log the autoencoder and the denoiser as PyTorch models (exported programs, not pickles)."""
    if find_spec("torch.export") is None:
        tqdm.write("train: autoencoder and diffusion are logged as models by PyTorch 2.1 or newer alone")
        return
    modules = {"autoencoder": (generator.autoencoder, generator.standardizer.size)}
    if generator.denoiser:
        modules["diffusion"] = (Denoising(generator.denoiser), len(generator.latent_mean) + 1)
    with _quiet():
        for name, (module, size) in modules.items():
            example = np.zeros((2, size), dtype=np.float32)
            mlflow.pytorch.log_model(module, name=name, input_example=example, pip_requirements=REQUIREMENTS)


class Denoising(torch.nn.Module):
    """A denoiser of one input, as MLflow's models have it: latents and, as the last column, timesteps (B, L + 1)."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Prediction (B, L)."""
        return self.denoiser(rows[:, :-1], rows[:, -1])


def _log_generator(experiment: Experiment, folder: Path) -> None:
    """Log a model whose `predict` returns new weights."""
    with _quiet():
        mlflow.pyfunc.log_model(
            name="generator",
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"generator": str(folder)},
            model_config={"sampler": experiment.sampler, "steps": experiment.sampling_steps},
            pip_requirements=REQUIREMENTS,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's notes on what it infers about models from the terminal."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _copy_metrics(run_id: str, metrics: dict[str, float]) -> None:
    """Set final metrics on another run."""
    log = RunLog(run_id)
    for name, value in metrics.items():
        if not name.startswith("system/"):
            log(Point(name, value))
    log.flush()


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


def main(experiment: Experiment, *, fresh: bool = False) -> Done:
    """All stages under one parent run, to which their metrics are copied; parents compare in `mlflow ui`."""
    digest = config.digest(experiment, STAGES["evaluate"].sections)
    with _run("main", experiment, digest) as parent:
        metrics: dict[str, float] = {}
        known: dict[str, Done] = {}
        for stage in STAGES:
            done = execute(stage, experiment, fresh=fresh, known=known)
            mlflow.set_tag(f"pdiff.{stage}_run", done.run_id)
            metrics |= done.metrics
        _copy_metrics(parent.info.run_id, metrics)
        mlflow.log_artifact(str(done.folder / "report.html"))
    return Done(parent.info.run_id, done.folder, metrics)


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
    tags, digest = tags or {}, config.digest(experiment, STAGES["evaluate"].sections) if experiment else ""
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


COMPARED = {
    "original mean": "test_accuracy/original_mean",
    "max": "test_accuracy/original_max",
    "min": "test_accuracy/original_min",
    "generated mean": "test_accuracy/generated_mean",
    "max ": "test_accuracy/generated_max",
    "min ": "test_accuracy/generated_min",
    "average": "test_accuracy/average_mean",
    "original-original": "similarity/original_original",
    "generated-generated": "similarity/generated_generated",
    "original-generated(max)": "similarity/original_generated_max",
}
"""Column -> metric of the table that `compare` returns."""


def compare() -> pd.DataFrame:
    """Every finished run of all stages, one row each, the oldest first: test accuracy in %, similarity, seconds."""
    rows = []
    for run in reversed(_finished("main")):
        metrics, parameters = run.data.metrics, run.data.params
        row = {"tag": run.data.tags["pdiff.tag"], "seed": parameters["config.seed"]}
        for column, name in COMPARED.items():
            row[column] = metrics.get(name, math.nan) * (100 if name.startswith("test_accuracy") else 1)
        row["fit s"] = sum(metrics.get(f"seconds/{part}", math.nan) for part in ("autoencoder", "diffusion"))
        row["draw s"] = metrics.get("seconds/generate", math.nan)
        rows.append(row | {"run": run.info.run_id[:8]})
    return pd.DataFrame(rows)


def log_leaderboard(names: Sequence[str] = (), *, only_ours: bool = False) -> tuple[Done, pd.DataFrame]:
    """Published results and ours side by side, as a run of its own: `leaderboard.csv`, `leaderboard.html`.

    Args:
        names: a tag is shown that holds one of them; every tag when absent.
        only_ours: leave out what was never run.

    Returns:
        The run, and the board as `leaderboard.table` makes it.
    """
    ours = _evaluations()
    others = [] if only_ours else [Result(tag, config.published(tag)) for tag in config.runnable() if tag not in ours]
    results = sorted([*ours.values(), *others], key=lambda result: (not result.ours, not result.published, result.tag))
    shown = [result for result in results if not names or any(name in result.tag for name in names)]
    board = leaderboard.table(shown)
    with _run("leaderboard") as run:
        mlflow.log_text(board.to_csv(index=False), "leaderboard.csv")
        mlflow.log_text(leaderboard.page(board), "leaderboard.html")
    return Done(run.info.run_id, _artifacts(run), {}), board


def _evaluations() -> dict[str, Result]:
    """The latest finished evaluation of every tag; one of the tag as it stands comes before any with changes."""
    known, results = config.tags(), {}
    own = cache(config.load)
    for run in _finished("main", "evaluate"):
        tag, parameters = run.data.tags["pdiff.tag"], run.data.params
        values = {key.removeprefix(CONFIG): value for key, value in parameters.items() if key.startswith(CONFIG)}
        changed = config.changed(own(tag), values) if tag in known else {}
        if tag not in results or (results[tag].changed and not changed):
            results[tag] = Result(tag, config.published(tag), run.data.metrics, changed, run.info.run_id)
    return results


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
