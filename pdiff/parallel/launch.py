"""Launching: a function runs in several data-parallel processes of this machine, by torch's elastic launcher."""

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
from contextlib import contextmanager, suppress
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
TIMEOUT = timedelta(hours=2)  # of a collective operation: one rank may write a large file while the others wait
TRACE = 4000  # last characters of a traceback that are reported
Result = TypeVar("Result")


def launch(
    function: Callable[..., Result],
    *arguments: Any,
    log: Callable[[Any], object],
    processes: int,
    device: torch.device,
    **options: Any,
) -> Result:
    """Compute `function(*arguments, log=log, **options)` in several new processes, the ranks of one group.

    All processes end when one fails, and when this process ends, for whatever reason. Call it in the main thread.

    Args:
        function: of a module that can be imported; called on every rank.
        arguments: picklable.
        log: called here with what rank 0 logs; what other ranks log is dropped.
        processes: number of ranks.
        device: its type: the CPU, or a GPU for each rank, which is the current one of `torch.cuda` there.
        options: picklable.

    Returns:
        What rank 0 returns.

    Raises:
        UserError, OSError: the first one that a rank raised; or there are too few GPUs.
        ProcessError: a rank failed otherwise.
        BaseException: what the log raised, such as `Pruned`; all processes end when rank 0 logs the next time.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _check(processes, device)
    pipes = [multiprocessing.get_context("spawn").Pipe(duplex=False) for _ in range(processes)]
    readers, writers = zip(*pipes, strict=True)
    errors: list[BaseException] = []
    listener = threading.Thread(target=_listen, args=(list(readers), log, errors))
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
    if failure or errors:
        _raise(errors, failure, processes)
    return results[0]


def _launch_config(processes: int, logs: str) -> Any:
    """One start on this machine, without restarts, at a free port."""
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


def _raise(errors: Sequence[BaseException], failure: Any, processes: int) -> NoReturn:
    """Raise the error of the user or of the log, if there is one; else report a killed rank; else the first failure."""
    for error in errors:
        if not isinstance(error, ProcessError):
            raise error
    if failure and failure[1].exitcode < 0:
        raise ProcessError(f"process {failure[0]} of {processes} was ended by {failure[1].signal_name()}")
    raise errors[0] if errors else ProcessError(f"process {failure[0]} of {processes} ended with {failure[1].exitcode}")


def _listen(readers: list[Connection], log: Callable[[Any], object], errors: list[BaseException]) -> None:
    """Pass on what ranks send until all have ended; collect exceptions.

    When the log raises one, rank 0 is no longer listened to: its next point meets a closed pipe, which ends all.
    """
    while readers:
        for reader in wait(readers):
            try:
                message = reader.recv()
            except (EOFError, OSError):  # the process ended, or was killed in the middle of a message
                readers.remove(reader)
                continue
            if isinstance(message, Exception):
                errors.append(message)
                continue
            try:
                log(message)
            except BaseException as error:  # `Pruned`, too
                errors.append(error)
                readers.remove(reader)
                reader.close()


def _ignore(message: Any) -> None:
    """A log that drops every point."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the launcher's reports of failures and signals off the terminal."""
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
    """Restore the signal handlers that the launcher replaces."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    handlers = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _work(writers: Sequence[Connection], kind: str, function: Callable[..., Result]) -> Result:
    """What every rank does: join the group, compute, and send a failure before the process ends."""
    number, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for ended in (signal.SIGINT, signal.SIGTERM):  # end at once, even in a collective operation
        signal.signal(ended, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())  # the default one is shared among processes: a killed one would keep it
    if number > 0:
        _silence()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group(BACKENDS[kind], timeout=TIMEOUT)
        result = function(log=_ignore if number else writers[0].send)
        dist.destroy_process_group()
        return result
    except (UserError, OSError) as error:
        reason: Exception = error
    except Exception:
        trace = traceback.format_exc()[-TRACE:]
        reason = ProcessError(f"process {number} of {processes} failed:\n{trace}")
    with suppress(BrokenPipeError):  # the log raised an exception, and `launch` has stopped listening
        writers[number].send(reason)
    sys.stdout.flush()
    os._exit(1)  # an orderly exit could wait for the other ranks


def _silence() -> None:
    """Drop all output, progress bars included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
