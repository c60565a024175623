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
from functools import partial, wraps
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from pdiff.errors import ProcessError, UserError

BACKENDS = {"cpu": "cpu:gloo", "cuda": "cpu:gloo,cuda:nccl"}
PATIENCE = timedelta(hours=2)  # for a process that writes a large file, or downloads, while the others wait
TRACE = 4000  # characters of a traceback that are told

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rows() -> slice:
    """This process's rows of a global batch; they may be one fewer than another's."""
    return slice(rank(), None, world())


def own(draw: Callable[..., Tensor], like: Tensor, count: int | None = None) -> Tensor:
    """Random numbers for this process's rows of a global batch, the same as one process draws for them.

    Args:
        draw: `torch.randn` or `torch.rand`.
        like: this process's rows (b, ...).
        count: rows of the global batch; of no matter where there is one process.
    """
    count = count if count and world() > 1 else len(like)
    return draw((count, *like.shape[1:]), dtype=like.dtype, device=like.device)[rows()]


def summed(value: float) -> float:
    """The sum of a number over all processes."""
    if world() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def mean(value: float) -> float:
    """The mean of a number over all processes: the same on all of them."""
    return summed(value) / world()


def gathered(part: Tensor, count: int) -> Tensor:
    """All rows (count, ...) of a tensor on the CPU, of which every process has its `rows()`."""
    if world() == 1:
        return part
    most = -(-count // world())
    padded = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])]).contiguous()
    if not padded.numel():  # old versions of gloo die of it
        return part.new_zeros(count, *part.shape[1:])
    flat = padded.reshape(-1).view(torch.uint8)  # gloo does not know every type
    with torch.inference_mode(False):  # before PyTorch 2.1 nothing could be received otherwise
        parts = [torch.empty_like(flat) for _ in range(world())]
        dist.all_gather(parts, flat)
    return torch.stack([p.view(part.dtype).view_as(padded) for p in parts], dim=1).flatten(0, 1)[:count]


def rank_zero_only(function: Callable[Arguments, Any]) -> Callable[Arguments, None]:
    """A function that process 0 alone carries out, such as writing a file."""

    @wraps(function)
    def on_rank_zero(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if rank() == 0:
            function(*args, **kwargs)

    return on_rank_zero


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """A block that process 0 is through with before the others enter it, such as a download."""
    if rank() > 0:
        summed(0.0)
    yield
    if rank() == 0:
        summed(0.0)


# -- training -----------------------------------------------------------------


def shared(module: nn.Module, loss: Callable[[Any], Tensor], count: int) -> Callable[[Any], Tensor]:
    """A loss of this process's rows whose gradients are those of the global batch's loss, on every process.

    Its values are such that their mean over the processes is the loss of the global batch. Batch normalisation
    measures the global batch. Dropout inside the module differs from that of one process.

    Args:
        module: what is trained.
        loss: rows -> their mean loss.
        count: rows of the global batch.

    Raises:
        UserError: fewer rows than processes.
    """
    if world() == 1:
        return loss
    if count < world():
        raise UserError(f"processes {world()}: a batch has only {count} rows, expected at least one a process")
    weight = len(range(count)[rows()]) * world() / count
    objective = _Objective(module, lambda batch: weight * loss(batch))
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, static_graph=True)


class _Objective(nn.Module):
    """A loss as a module, as DistributedDataParallel wants it; of what is trained, for the rest is the same anyway."""

    def __init__(self, module: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(p for p in module.parameters() if p.requires_grad)
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        with _GlobalBatchNorm():
            return self.loss(batch)


class _GlobalBatchNorm(TorchFunctionMode):
    """Within it, batch normalisation measures the global batch, whoever calls it; no module need be replaced."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = global_batch_norm if function is F.batch_norm else function
        return replaced(*args, **(kwargs or {}))


def global_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of rows (b, channels, ...) with the statistics of the global batch."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if x.is_cuda:  # what nn.SyncBatchNorm does; it has no kernels for the CPU
        from torch.nn.modules._functions import SyncBatchNorm

        group = dist.group.WORLD
        return SyncBatchNorm.apply(x, weight, bias, running_mean, running_var, eps, momentum, group, world())
    axes = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    totals = _Sum.apply(torch.cat([x.sum(axes), x.new_tensor([x.numel() / x.shape[1]])]))
    count = totals[-1].detach()
    average = totals[:-1] / count
    centered = x - average.view(shape)
    variance = _Sum.apply(centered.square().sum(axes)) / count
    with torch.no_grad():
        for running, now in ((running_mean, average), (running_var, variance * count / (count - 1))):
            if running is not None:
                running.lerp_(now.to(running.dtype), momentum)
    scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
    normalised = centered * scale.view(shape)
    return normalised if bias is None else normalised + bias.view(shape)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, with its gradient: the sum of theirs."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


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
    from torch.distributed.elastic import multiprocessing as elastic
    from torch.distributed.launcher.api import LaunchConfig

    place = {"log_dir": logs}
    if hasattr(elastic, "DefaultLogsSpecs"):  # since PyTorch 2.3
        place = {"logs_specs": elastic.DefaultLogsSpecs(log_dir=logs)}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        **place,
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
