"""Where the workers of a sweep run: as processes of this host, or as jobs that submitit hands to Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from pdiff.errors import UserError

PARENT = "PDIFF_PARENT"  # the process without which a worker shall not go on
MINUTES = 24 * 60  # of a job, unless its options say otherwise
Command = Sequence[str]


class Job(Protocol):
    """A worker that was started."""

    log: Path

    def running(self) -> bool:
        """Whether it has not ended."""

    def stop(self) -> None:
        """Ask it to end cleanly."""

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; end it after so many seconds."""


class Process:
    """A process of this host, in a session of its own: what interrupts the parent reaches it through `stop` alone."""

    def __init__(self, command: Command, variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=out, stderr=out, start_new_session=True
            )

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Send SIGTERM."""
        self.process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; send SIGKILL after so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Submitted:
    """A job of submitit's."""

    def __init__(self, job: Any) -> None:
        self.job, self.log = job, Path(job.paths.stderr)

    def running(self) -> bool:
        """Whether it has not ended; a job that waits in the queue has not."""
        return not self.job.done()

    def stop(self) -> None:
        """Cancel it; Slurm sends SIGTERM."""
        self.job.cancel(check=False)

    def wait(self, seconds: float) -> None:
        """Leave its end to the cluster."""


def processes(workers: int, folder: Path, options: Mapping[str, Any], *, pinned: bool) -> Callable[..., Job]:
    """Start workers on this host: they share its cores, and its GPUs in turn where `pinned`."""
    if options:
        raise UserError(f"--launcher-options {options}: the launcher 'processes' has none")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(min(max(1, cores // workers), int(os.environ.get("OMP_NUM_THREADS") or cores)))
    shared = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = [gpu for gpu in visible.split(",") if gpu] if pinned else []

    def start(command: Command, variables: Mapping[str, str], slot: int) -> Process:
        pin = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        log = folder / f"worker_{slot}.log"
        return Process(command, {**variables, **shared, **pin, PARENT: str(os.getpid())}, log)

    return start


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have variables in the environment: jobs inherit it, so that no password is pickled into a file of submitit's,
    and what the cluster sets, such as a job's GPUs, stands."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def submitted(cluster: str, folder: Path, options: Mapping[str, Any]) -> Callable[..., Job]:
    """Start workers through submitit, whose `AutoExecutor.update_parameters` takes the options."""
    try:
        import submitit
        from submitit.helpers import CommandFunction
    except ImportError:
        raise UserError(f"--launcher {cluster} needs submitit: pip install 'pdiff[team]'") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{"timeout_min": MINUTES, "name": "pdiff", **options})
    except (TypeError, ValueError, NameError, RuntimeError) as error:
        raise UserError(f"--launcher {cluster}: {' '.join(str(error).split())}") from None

    def start(command: Command, variables: Mapping[str, str], slot: int) -> Submitted:
        with _environment(variables):
            return Submitted(executor.submit(CommandFunction(list(command))))

    return start


def launcher(kind: str, workers: int, folder: Path, options: Mapping[str, Any], *, pinned: bool) -> Callable[..., Job]:
    """What starts workers: called with a command, environment variables, and which of the workers it is.

    Args:
        kind: "processes", "slurm", or "local" for submitit without a cluster.
        workers: how many there are at most.
        folder: for their logs; on a cluster, one that all hosts share.
        options: of submitit.
        pinned: give each worker one of this host's GPUs.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if kind == "processes":
        return processes(workers, folder, options, pinned=pinned)
    if kind in ("slurm", "local"):
        return submitted(kind, folder, options)
    raise UserError(f"--launcher {kind!r}: expected processes, slurm or local")


def pdiff(*words: str) -> list[str]:
    """The command line of pdiff itself."""
    return [sys.executable, "-m", "pdiff", *words]


def abandoned() -> bool:
    """Whether the process that started this worker is gone."""
    return str(os.getppid()) != os.environ.get(PARENT, str(os.getppid()))
