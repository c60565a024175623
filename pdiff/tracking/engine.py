"""The engine: runs the stages of an experiment in order, each at most once; reuses, locks, resumes.

It speaks to a `Store` of finished runs and knows nothing of MLflow, which is one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from pdiff.errors import Damaged, Pruned, UserError
from pdiff.experiment import config, stages
from pdiff.experiment.digests import fingerprint
from pdiff.experiment.history import LINEAGE, STATE, Metrics
from pdiff.experiment.metrics import alarms
from pdiff.experiment.schema import Experiment
from pdiff.files import write_json
from pdiff.method.log import Point
from pdiff.method.options import resolve
from pdiff.parallel.interrupts import uninterrupted
from pdiff.tracking.seals import MANIFEST, seal, verify

VERDICT = "verdict.md"  # what an evaluation has found, in three sentences
SEAL = "pdiff.seal"  # tag with the checksum of the manifest
LOCK_SECONDS = 0.1  # between two attempts to get a lock


@dataclass(frozen=True)
class Done:
    """A finished run.

    Attributes:
        run_id: its identifier.
        metrics: its final metrics.
        fetch: makes its artifacts available in a folder of this machine.
        tags: what else the store knows of it; SEAL among them is the checksum of the manifest of its artifacts.
        remedy: says which command computes it again; asked only where there is damage.
    """

    run_id: str
    metrics: Metrics
    fetch: Callable[[], Path]
    tags: Mapping[str, str] = field(default_factory=dict)
    remedy: Callable[[], str] = str

    @cached_property
    def folder(self) -> Path:
        """Its artifacts, as they were written.

        Raises:
            Damaged: a file that is missing or changed.
        """
        folder = self.fetch()
        if sealed := self.tags.get(SEAL):
            try:
                verify(folder, sealed)
            except Damaged as error:
                raise Damaged(error.path, f"{error.reason}; {self.remedy()}".removesuffix("; ")) from None
        return folder

    @property
    def sound(self) -> bool:
        """Whether its artifacts are as they were written; reports damage."""
        try:
            return bool(self.folder)
        except Damaged as error:
            tqdm.write(f"warning: {error}")
            return False


class Run(Protocol):
    """A run in progress."""

    run_id: str

    def log(self, point: Point) -> object:
        """Record a point."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Record tags, at the latest when the run ends."""

    def upload(self, paths: Iterable[Path]) -> None:
        """Keep files and folders as artifacts."""

    def done(self) -> Done:
        """The run as it will be found once it is finished."""


class Store(Protocol):
    """Where runs are kept."""

    def find(self, tags: Mapping[str, str]) -> Done | None:
        """The latest finished run that has all of these tags and still its artifacts, if there is one."""

    def open(self, stage: str, experiment: Experiment, digest: str) -> AbstractContextManager[Run]:
        """A new run, inside the one that is open; an exception in the block makes it a failed one."""

    def link(self, run_id: str) -> str:
        """Where a run can be looked at in a browser."""

    def reuse(self, stage: str, experiment: Experiment, done: Done) -> None:
        """Take note that a finished run serves an experiment instead of a new one."""


def identity(stage: str, digest: str, upstream: Mapping[str, Done]) -> dict[str, str]:
    """Tags of a run of a stage: what decides its result, and the runs that it read."""
    return {"pdiff.stage": stage, "pdiff.digest": digest, **{f"pdiff.{n}_run": d.run_id for n, d in upstream.items()}}


def work_folder() -> Path:
    """Where unfinished stages keep what they have: the variable PDIFF_WORK, else `.pdiff` in the current folder."""
    return Path(os.environ.get("PDIFF_WORK", ".pdiff")).absolute()


class Pipeline:
    """The stages of one experiment.

    Args:
        experiment: what they do.
        store: where their runs are found and kept.
        known: finished stages that this experiment has in common with another one.
        repair: repeat finished stages whose artifacts are damaged, and those that read them.
    """

    def __init__(
        self, experiment: Experiment, store: Store, *, known: Mapping[str, Done] | None = None, repair: bool = False
    ) -> None:
        self.experiment, self.store, self.repair = experiment, store, repair
        self.digests, self.known = stages.all_digests(experiment), dict(known or {})

    def execute(self, stage: str, *, fresh: bool = False) -> Done:
        """Run a stage after what it reads, unless it is finished already.

        Of two processes that want the same stage, the second waits for the first and reuses its result.

        Args:
            stage: one that the experiment has.
            fresh: repeat this stage, and those that are part of it, even if they are finished.
        """
        if stage not in self.known:
            with _exclusively(self.digests[stage], f"{stage} of {self.experiment.tag}"):
                found = None if fresh else self._find(stage)
                if found:
                    tqdm.write(f"{stage}: reusing run {found.run_id} (--fresh repeats it)")
                    self.store.reuse(stage, self.experiment, found)
                    _clear(self.digests[stage])  # a process that was killed once its run had finished left its work
                self.known[stage] = found or self._run(stage, fresh=fresh)
        return self.known[stage]

    def _find(self, stage: str) -> Done | None:
        """A finished run of a stage that has read the runs that would be read now."""
        found: dict[str, Done] = dict(self.known)
        for name in stages.needed(stage, self.experiment):
            if name not in found:
                upstream = {other: found[other] for other in stages.reads(name, self.experiment)}
                done = self.store.find(identity(name, self.digests[name], upstream))
                if done is None or (self.repair and not done.sound):  # then what reads it must run, too
                    return None
                found[name] = done if self.repair else replace(done, remedy=partial(self._remedy, name))
        return found[stage]

    def _remedy(self, stage: str) -> str:
        """How a user heals the damaged artifacts of a stage."""
        words, same = config.words(self.experiment), "the same command with --repair computes it again"
        if not words:
            return same
        whole = next(iter(stages.STAGES[stage].part_of), stage)
        command = shlex.join(["pdiff", whole, *words, "--fresh"])
        return f"`{command}` or {same}"

    def _run(self, stage: str, *, fresh: bool) -> Done:
        """Run a stage in its work folder, then keep what it wrote there."""
        digest = self.digests[stage]
        with uninterrupted():  # it imports torch
            resolve(stages.STAGES[stage].run)
        with self.store.open(stage, self.experiment, digest) as run:
            upstream = {
                name: self.execute(name, fresh=fresh and stage in stages.STAGES[name].part_of)
                for name in stages.reads(stage, self.experiment)
            }
            run.tag(identity(stage, digest, upstream))
            ids = fingerprint([done.run_id for done in upstream.values()])
            work = work_folder() / f"{digest}-{ids[:8]}"
            if fresh:
                _clear(digest)
            folders = {name: done.folder for name, done in upstream.items()}
            tqdm.write(f"{stage}: run {run.run_id}" + (", resuming" if work.exists() else ""))
            work.mkdir(parents=True, exist_ok=True)
            read = {name: {"run": done.run_id, "link": self.store.link(done.run_id)} for name, done in upstream.items()}
            write_json(work / LINEAGE, read)
            compute = partial(self._compute(stage), self.experiment, work, log=run.log, **folders)
            try:
                metrics = _undamaged(compute, work)
            except UserError:
                if not any(path.is_file() for path in (work / STATE).rglob("*")):  # it failed before it did anything
                    _clear(digest)
                raise
            except Pruned:  # it will not be resumed
                _clear(digest)
                raise
            for name, value in metrics.items():
                run.log(Point(name, value))
            warn(run, self.experiment)
            # The rest is either the state, or what a killed process left half-written.
            written = sorted(path for path in work.iterdir() if path.name != MANIFEST and path.name[0] != ".")
            run.tag({SEAL: seal(work, written)})
            run.upload([*written, work / MANIFEST])
        _clear(digest)
        return run.done()

    def _compute(self, stage: str) -> Callable[..., Metrics]:
        """The function of a stage, in as many processes as share it."""
        function, processes = partial(stages.run, stage), stages.processes(stage, self.experiment)
        if processes == 1:
            return function
        from pdiff.method.training import resolve_device
        from pdiff.parallel.launch import launch

        return partial(launch, function, processes=processes, device=resolve_device(self.experiment.device))


def warn(run: Run, experiment: Experiment, *, quiet: bool = False) -> None:
    """Report what the metrics of a run warn of, and tag the run with it; `quiet` leaves the report to another run."""
    sections = ("prepare", *experiment.generator_options.sections) if stages.fits(experiment) else ()
    if found := alarms(run.done().metrics, experiment.generators, sections=sections):
        run.tag({"pdiff.alarm": ", ".join(found)})
        for text in () if quiet else found.values():
            tqdm.write(f"warning: {text}")


def _undamaged(compute: Callable[[], Metrics], work: Path) -> Metrics:
    """Compute a stage; if what it has in its work folder cannot be read, drop that and begin again."""
    try:
        return compute()
    except Damaged as error:
        if not error.path.is_relative_to(work):
            raise
        tqdm.write(f"warning: {error}; dropped, and computed again")
        shutil.rmtree(work)
        work.mkdir()
        return compute()


@contextmanager
def _exclusively(digest: str, what: str) -> Iterator[None]:
    """Hold the lock of a digest; report that another process holds it.

    Its file is removed afterwards. Files of locks are opened and removed only under one more lock, and nobody waits for
    a lock with its file open: so two processes never hold the lock of one digest by two files, one of them removed.
    """
    work_folder().mkdir(parents=True, exist_ok=True)
    path = work_folder() / f"{digest}.lock"
    gate, lock = FileLock(work_folder() / "stages.lock"), FileLock(path)
    for attempt in count():
        with gate, suppress(Timeout):
            lock.acquire(blocking=False)
        if lock.is_locked:
            break
        if attempt == 2:  # a stage that is finished is held for a moment only
            tqdm.write(f"{what}: waiting for another process that runs it")
        time.sleep(LOCK_SECONDS)
    try:
        yield
    finally:
        with gate:
            path.unlink(missing_ok=True)
            lock.release()


def _clear(digest: str) -> None:
    """Remove unfinished work on a stage, also that on earlier runs of what it reads."""
    for folder in work_folder().glob(f"{digest}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def main(experiment: Experiment, store: Store, *, fresh: bool = False, repair: bool = False) -> Done:
    """Run all stages under one parent run, to which their metrics are copied, so that parents compare.

    Returns:
        The parent run, with all metrics and the artifacts of `evaluate` or `audit`.
    """
    pipeline = Pipeline(experiment, store, repair=repair)
    with store.open("main", experiment, pipeline.digests[stages.evaluation(experiment)]) as run:
        metrics: Metrics = {}
        for stage in stages.of(experiment):
            done = pipeline.execute(stage, fresh=fresh)
            run.tag({f"pdiff.{stage}_run": done.run_id})
            metrics |= done.metrics
        for name, value in metrics.items():
            run.log(Point(name, value))
        warn(run, experiment, quiet=True)
        evaluation = pipeline.known[stages.evaluation(experiment)]
        run.upload([evaluation.folder / name for name in ("report.html", VERDICT)])
    return Done(run.run_id, metrics, lambda: evaluation.folder)
