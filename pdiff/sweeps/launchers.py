"""Where the workers of a sweep run: processes of this host, this process, or jobs of a cluster through submitit."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pdiff.errors import UserError

PARENT = "PDIFF_PARENT"  # the process without which a worker does not go on
MINUTES = 24 * 60  # of a job, unless its options say otherwise


class Task(NamedTuple):
    """What a worker does: a command line with environment variables, and the same as a function."""

    command: Sequence[str]
    variables: Mapping[str, str]
    call: Callable[[], None]


class Job(Protocol):
    """A worker that was started."""

    log: Path

    def running(self) -> bool:
        """Whether it has not ended."""

    def stop(self) -> None:
        """Ask it to end cleanly."""

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; kill it after so many seconds."""


Start = Callable[[Task, int], Job]  # the integer says which of the workers it is


class Process:
    """A process of this host, in a new session, so that Ctrl-C in the terminal does not reach it directly."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
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
    """A job of submitit."""

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


class Returned:
    """A task that ran in this process, and has ended."""

    log = Path(os.devnull)

    def running(self) -> bool:
        """Never."""
        return False

    def stop(self) -> None:
        """Nothing is left to stop."""

    def wait(self, seconds: float) -> None:
        """Nothing is left to wait for."""


def processes(workers: int, folder: Path, options: Mapping[str, Any], *, pinned: bool) -> Start:
    """Workers as processes of this host: they divide its cores, and where `pinned` take its GPUs in turn."""
    _refuse_options("processes", options)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(min(max(1, cores // workers), int(os.environ.get("OMP_NUM_THREADS") or cores)))
    shared = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    gpus = visible_gpus() if pinned else []

    def start(task: Task, slot: int) -> Process:
        pin = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        variables = {**task.variables, **shared, **pin, PARENT: str(os.getpid())}
        return Process(task.command, variables, folder / f"worker_{slot}.log")

    return start


def visible_gpus() -> list[str]:
    """The GPUs of this host, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        return [str(gpu) for gpu in range(torch.cuda.device_count())]
    return [gpu for gpu in visible.split(",") if gpu]


def inline(workers: int, folder: Path, options: Mapping[str, Any], *, pinned: bool) -> Start:
    """One worker in this process, for a debugger: `start` returns when no trial is left."""
    _refuse_options("inline", options)
    if workers > 1:
        raise UserError(f"--workers {workers}: the launcher 'inline' has one worker, this process")

    def start(task: Task, slot: int) -> Returned:
        task.call()
        return Returned()

    return start


def _refuse_options(launcher: str, options: Mapping[str, Any]) -> None:
    if options:
        raise UserError(f"--launcher-options {options}: the launcher {launcher!r} has none")


def submitted(cluster: str, workers: int, folder: Path, options: Mapping[str, Any], *, pinned: bool) -> Start:
    """Workers as jobs of submitit, whose `AutoExecutor.update_parameters` takes the options."""
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

    def start(task: Task, slot: int) -> Submitted:
        with _environment(task.variables):
            return Submitted(executor.submit(CommandFunction(list(task.command))))

    return start


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a block. Jobs inherit them, so that submitit pickles no password into a file, and
    what the cluster sets, such as a job's GPUs, remains."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


LAUNCHERS: dict[str, Callable[..., Start]] = {
    "processes": processes,
    "inline": inline,
    "local": partial(submitted, "local"),  # submitit without a cluster
    "slurm": partial(submitted, "slurm"),
}


def launcher(kind: str, workers: int, folder: Path, options: Mapping[str, Any], *, pinned: bool) -> Start:
    """The function that starts workers.

    Args:
        kind: an entry of `LAUNCHERS`.
        workers: how many run at once, at most.
        folder: for their logs; on a cluster, one that all hosts see.
        options: of submitit.
        pinned: give each worker one of this host's GPUs.

    Raises:
        UserError: an unknown kind, options that it does not take, a library that is not installed.
    """
    if kind not in LAUNCHERS:
        raise UserError(f"--launcher {kind!r}: expected one of {', '.join(LAUNCHERS)}")
    start = LAUNCHERS[kind](workers, folder, options, pinned=pinned)

    def start_in_folder(task: Task, slot: int) -> Job:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return start(task, slot)

    return start_in_folder


def abandoned() -> bool:
    """Whether the process that started this worker is gone."""
    return str(os.getppid()) != os.environ.get(PARENT, str(os.getppid()))
