"""The seam with MLflow: run a stage as a tracked run, find a finished one, log models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlflow
from filelock import FileLock, Timeout
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Run
from tqdm.auto import tqdm

from pdiff.errors import Pruned, UserError
from pdiff.experiment import digests
from pdiff.experiment.history import HISTORY, STATE
from pdiff.experiment.schema import Experiment
from pdiff.experiment.stages import STAGES, processes
from pdiff.files import copy_file, read_json
from pdiff.method.generators.base import Generator
from pdiff.method.log import Point
from pdiff.method.training import resolve_device
from pdiff.parallel.launch import launch
from pdiff.tracking.models import _log_generator, _log_models, _register
from pdiff.tracking.runs import RunLog, _copy_metrics, _run, commit
from pdiff.tracking.store import _artifacts, _is_whole, _runs, work_folder


class Done(NamedTuple):
    """A finished run of a stage: where its artifacts are, and its metrics."""

    run_id: str
    folder: Path
    metrics: dict[str, float]


def finished(stage: str, digest: str) -> Run | None:
    """The latest finished run of a stage with this digest whose artifacts are still there."""
    condition = (
        f"attributes.status = 'FINISHED' and tags.`pdiff.digest` = '{digest}' and tags.`pdiff.stage` = '{stage}'"
    )
    return _latest(condition)


def _latest(condition: str) -> Run | None:
    """The latest run that did something itself and whose artifacts are there."""
    return next((run for run in _runs(condition) if "pdiff.reused" not in run.data.tags and _is_whole(run)), None)


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
    digest = digests.digest(experiment, STAGES[stage].sections)
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


def main(experiment: Experiment, *, fresh: bool = False) -> Done:
    """All stages under one parent run, to which their metrics are copied; parents compare in `mlflow ui`."""
    digest = digests.digest(experiment, STAGES["evaluate"].sections)
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
