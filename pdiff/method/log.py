"""What stages tell the world: points of metrics. Who listens (a list, a terminal, MLflow) is not their concern."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


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
    """Log `seconds/<what>`, and `memory_mb/<what>`: the peak so far of the process, or of the GPU in the block."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    log(Point(f"seconds/{what}", time.perf_counter() - start))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes elsewhere
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_initialized()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    )
    log(Point(f"memory_mb/{what}", peak / 2**20))
