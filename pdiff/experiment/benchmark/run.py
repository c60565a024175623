"""The whole benchmark, from sizes to results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.experiment.benchmark import PARTS, SCALING, Sizes, against, scaling
from pdiff.experiment.benchmark.measure import Cost, Work, cost, gemm_peak, peaks
from pdiff.experiment.benchmark.page import Found, machine
from pdiff.method.options import resolve
from pdiff.method.training import resolve_device
from pdiff.parallel.allocator import keep_freed_memory


def run(sizes: Sizes, parts: Sequence[str], *, device: str, command: Sequence[str]) -> Found:
    """Measure the peaks of the machine, every part, growth, and another program.

    Args:
        sizes: how large everything is.
        parts: names in PARTS, and SCALING.
        device: of PyTorch, or auto.
        command: words of another program, see `against.parsed`; none where there is none.

    Raises:
        UserError: there is no such device, or a program fails.
    """
    try:
        place = resolve_device(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--{error}" if isinstance(error, ValueError) else f"--device {device}: {error}") from None
    keep_freed_memory()  # as in every stage
    costs: dict[str, tuple[Work, Cost]] = {}
    with TemporaryDirectory(prefix="pdiff-benchmark-") as name:
        folder = Path(name)
        best = peaks(place, folder, sizes)
        for part in tqdm([part for part in parts if part != SCALING], desc="parts", unit="part", disable=None):
            work = resolve(PARTS[part].make)(sizes, place, folder)
            costs[part] = work, cost(work.call, place, seconds=sizes.seconds)
            best = best._replace(gemm=max(best.gemm, gemm_peak(place)))
        points = list(scaling.measure(sizes, place)) if SCALING in parts else []
        programs = []
        if command:
            against.write_files(sizes.networks, folder / "collection")
            programs = against.compare(list(command), folder / "collection", repeats=sizes.repeats)
        best = best.best(peaks(place, folder, sizes))
    about = machine(torch.get_num_threads(), torch.__version__, _name(place))
    return Found(about, best, costs, points, scaling.exponents(points), programs)


def _name(device: torch.device) -> str:
    """What a device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return str(device)
