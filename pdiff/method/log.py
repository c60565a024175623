"""Metrics on their way out: a log is any function of points, such as `list.append`, `print`, or an MLflow run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Point(NamedTuple):
    """One value of a metric at one step."""

    name: str
    value: float
    step: int = 0


Log = Callable[[Point], object]


def ignore(_: object) -> None:
    """A log, or another callback, that does nothing."""


@contextmanager
def measured(log: Log, what: str) -> Iterator[None]:
    """Log how long a block takes, and how much memory.

    `seconds/<what>` is logged when the block begins (0 at step 0) and when it ends, even by an exception (at step 1):
    where only the first of the two is on record, the process was killed inside the block.
    `memory_mb/<what>` is the peak memory of the process so far, or that of the GPU in the block.
    """
    if gpu := _gpu():
        gpu.reset_peak_memory_stats()
    log(Point(f"seconds/{what}", 0.0, 0))
    start = time.perf_counter()
    try:
        yield
    finally:
        log(Point(f"seconds/{what}", time.perf_counter() - start, 1))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes elsewhere
    gpu = _gpu()  # the block may have been the first to use it
    peak = gpu.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    log(Point(f"memory_mb/{what}", peak / 2**20))


def names_of_measured(*whats: str) -> tuple[str, ...]:
    """The metrics that `measured` logs of some blocks."""
    return tuple(f"{quantity}/{what}" for what in whats for quantity in ("seconds", "memory_mb"))


def _gpu() -> Any:
    """The module torch.cuda where it is in use; a process that has not imported torch uses no GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None
