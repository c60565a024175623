"""Measurements: seconds, peak memory and operations of a call; the most that the machine can do."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import inf, prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from pdiff.experiment.benchmark import Sizes
from pdiff.parallel.allocator import give_back_freed_memory

FEWEST, MOST = 3, 100  # repeats of a part
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the products whose speed is the peak
GEMM_REPEATS = 8


class Work(NamedTuple):
    """A part that is ready to be timed.

    Attributes:
        call: does the work; what it returns is thrown away.
        units: of work that a call does.
        bytes: that a call needs to move at least: what it reads and writes, each once.
        disk: whether they come from a file.
    """

    call: Callable[[], object]
    units: float
    bytes: float
    disk: bool = False


class Cost(NamedTuple):
    """What a call costs.

    Attributes:
        seconds: the median of the repeats.
        fastest: the least of them, in seconds.
        repeats: how many there were, after one that does not count.
        memory: the peak beyond what was held before, in bytes; NaN where the system does not tell.
        operations: floating-point operations of the matrix products and convolutions.
    """

    seconds: float
    fastest: float
    repeats: int
    memory: float
    operations: float


class Peaks(NamedTuple):
    """The most that a machine was seen to do.

    Attributes:
        gemm: operations per second of a large matrix product in float32, see `gemm_peak`.
        memory: bytes per second, read and written, of a large copy.
        disk: bytes per second of reading a file that is not in memory.
    """

    gemm: float
    memory: float
    disk: float

    def best(self, other: Peaks) -> Peaks:
        """The larger of each."""
        return Peaks(*map(max, self, other))

    def least_seconds(self, operations: float, moved: float, *, disk: bool) -> dict[str, float]:
        """The time that each resource needs for some work, were it used perfectly."""
        name = "disk" if disk else "memory"
        return {"gemm": operations / self.gemm, name: moved / getattr(self, name)}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, with what it has begun on a GPU."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def cost(call: Callable[[], object], device: torch.device, *, seconds: float) -> Cost:
    """Time a call again and again, for about some seconds; operations are counted in a first one, which warms up."""
    operations = operations_of(call)
    times: list[float] = []
    with peak_memory(device) as peak:
        while len(times) < FEWEST or (sum(times) < seconds and len(times) < MOST):
            times.append(seconds_of(call, device))
    return Cost(median(times), min(times), len(times), peak[0], operations)


def operations_of(call: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products and convolutions in a call: 2 for a multiplication and addition.

    PyTorch's counter does not know products that are added in place.
    """
    in_place = {torch.ops.aten.addmm_: _added_product, torch.ops.aten.baddbmm_: _added_product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        call()
    return float(counter.get_total_flops())


def _added_product(total: Sequence[int], a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    """Operations of total += a @ b, of shapes (..., m, k) and (..., k, n)."""
    return 2 * prod(a) * b[-1]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Measure the peak memory of a block in bytes, beyond what is held when it begins; the list holds it afterwards.

    On a CPU this is resident memory, whose highest mark Linux sets back on request; NaN elsewhere.
    """
    found = [float("nan")]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    before = float("nan")
    give_back_freed_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    yield found
    with suppress(OSError):
        found[0] = max(resident("VmHWM") - before, 0.0) if before == before else before


def resident(mark: str) -> float:
    """A size of this process in bytes, as Linux states it: VmRSS, now; VmHWM, the highest since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{mark}:"))


def peaks(device: torch.device, folder: Path, sizes: Sizes) -> Peaks:
    """Measure the peaks of this machine, the best of several attempts."""
    return Peaks(gemm_peak(device), *_bandwidths(device, folder, sizes.megabytes << 20))


def gemm_peak(device: torch.device) -> float:
    """Operations per second of a large matrix product in float32: by itself, or as a convolution, if that is faster.

    They come from different libraries, which do not use every processor alike: on one with AVX-512 of AMD's, the
    convolution was twice as fast.
    """
    n = GEMM_SIZE.get(device.type, GEMM_SIZE["cpu"])
    a = torch.randn(n, n, device=device)
    out = torch.empty_like(a)
    calls = (lambda: torch.mm(a, a, out=out), lambda: torch.conv1d(a[None], a[:, :, None]))
    with torch.no_grad():
        least = min(seconds_of(call, device) for call in calls for _ in range(GEMM_REPEATS))
    return 2 * n**3 / least


def _bandwidths(device: torch.device, folder: Path, size: int) -> tuple[float, float]:
    """Bytes per second of a copy of some bytes, and of reading a file of them."""
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    copying = min(seconds_of(lambda: b.copy_(a), device) for _ in range(GEMM_REPEATS))
    path = folder / "bandwidth"
    with path.open("wb") as file:
        file.write(a.cpu().numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    reading = inf
    for _ in range(FEWEST):
        forget(path)
        begin = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
        reading = min(reading, time.perf_counter() - begin)
    path.unlink()
    return 2 * size / copying, size / reading


def forget(path: Path) -> None:
    """Ask the system to drop a file from memory, so that it is read from the disk the next time."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def whole_process_memory() -> float:
    """The largest resident memory of the processes that this one has started and waited for, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)
