"""Several processes that compute what one would: each takes its rows of every batch. One process is the simple case."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from pdiff import compat
from pdiff.errors import ProcessError, UserError

BACKENDS = {"cpu": "cpu:gloo", "cuda": "cpu:gloo,cuda:nccl"}
PATIENCE = timedelta(hours=2)  # for a process that writes a large file, or downloads, while the others wait
TRACE = 4000  # characters of a traceback that are told
Result = TypeVar("Result")


# -- launching ----------------------------------------------------------------


def launch(
    function: Callable[..., Result],
    *arguments: Any,
    log: Callable[[Any], object],
    processes: int,
    device: torch.device,
    **options: Any,
) -> Result:
    """What `function(*arguments, log=log, **options)` returns, computed by several new processes of this machine.

    They end with this process, whatever ends it, and all of them when one fails. Must be called in the main thread.

    Args:
        function: of a module that can be imported; called in every process.
        arguments: picklable.
        log: told here what process 0 tells its log; those of the others are deaf.
        processes: how many.
        device: its type: each process has the CPU, or a GPU of its own, then the current one of `torch.cuda`.
        options: picklable.

    Raises:
        UserError, OSError: the first one that a process raised; or too few GPUs.
        ProcessError: a process failed otherwise.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _check(processes, device)
    pipes = [multiprocessing.get_context("spawn").Pipe(duplex=False) for _ in range(processes)]
    readers, writers = zip(*pipes, strict=True)
    told: list[Exception] = []
    listener = threading.Thread(target=_listen, args=(list(readers), log, told))
    listener.start()
    failure = None
    with TemporaryDirectory() as logs, _quiet(), _signals_restored():
        start = elastic_launch(_launch_config(processes, logs), _work)
        try:
            results = start(writers, device.type, partial(function, *arguments, **options))
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            failure = error.get_first_failure()
        finally:
            for writer in writers:
                writer.close()
            listener.join()
    if failure or told:
        _raise(told, failure, processes)
    return results[0]


def _launch_config(processes: int, logs: str) -> Any:
    """One start of some processes on this machine, at a port that is free."""
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        **compat.launcher_logs(logs),
    )


def _check(processes: int, device: torch.device) -> None:
    if device.type not in BACKENDS or device.index is not None:
        raise UserError(f"processes {processes} cannot share device {str(device)!r}, expected auto, cuda or cpu")
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"processes {processes}: this machine has {torch.cuda.device_count()} GPUs, expected no more")


def _raise(told: Sequence[Exception], failure: Any, processes: int) -> NoReturn:
    """The user's mistake, if one was told; else a process that was killed; else the first failure."""
    for error in told:
        if not isinstance(error, ProcessError):
            raise error
    if failure and failure[1].exitcode < 0:
        raise ProcessError(f"process {failure[0]} of {processes} was ended by {failure[1].signal_name()}")
    raise told[0] if told else ProcessError(f"process {failure[0]} of {processes} ended with {failure[1].exitcode}")


def _listen(readers: list[Connection], log: Callable[[Any], object], told: list[Exception]) -> None:
    """Hand on what processes tell, until all have ended; collect exceptions, those of the log among them."""
    while readers:
        for reader in wait(readers):
            try:
                message = reader.recv()
            except (EOFError, OSError):  # it ended, or was killed within a word
                readers.remove(reader)
                continue
            if isinstance(message, Exception):
                told.append(message)
                continue
            try:
                log(message)
            except Exception as error:
                told.append(error)
                log = _deaf


def _deaf(message: Any) -> None:
    """A log of nothing."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the launcher's own account of failures and signals from the terminal."""
    logger = logging.getLogger("torch.distributed.elastic")
    propagate, handler = logger.propagate, logging.NullHandler()
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """The launcher sets handlers of its own and leaves them."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    handlers = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _work(writers: Sequence[Connection], kind: str, function: Callable[..., Result]) -> Result:
    """What every process does: join the others, then compute. A failure is told before the process ends."""
    number, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for ended in (signal.SIGINT, signal.SIGTERM):  # at once, though others are waited for; SIGINT: the parent is dead
        signal.signal(ended, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())  # its own is shared among processes, and is missed where one is killed
    if number > 0:
        _silence()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group(BACKENDS[kind], timeout=PATIENCE)
        result = function(log=_deaf if number else writers[0].send)
        dist.destroy_process_group()
        return result
    except (UserError, OSError) as error:
        writers[number].send(error)
    except Exception:
        trace = traceback.format_exc()[-TRACE:]
        writers[number].send(ProcessError(f"process {number} of {processes} failed:\n{trace}"))
    sys.stdout.flush()
    os._exit(1)  # clearing up could wait for the others


def _silence() -> None:
    """Send output, progress bars among it, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
