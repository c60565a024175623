"""Data-parallel helpers: each rank handles a shard of every batch; the result is that of one process.

A process that has not imported torch is alone, so that nothing here imports torch to find that out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from torch import Tensor

Arguments = ParamSpec("Arguments")


def rank() -> int:
    """Rank of this process, from 0 on."""
    return dist.get_rank() if (dist := _process_group()) else 0


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if (dist := _process_group()) else 1


def _process_group() -> Any:
    """The module torch.distributed if this process belongs to a process group, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rows() -> slice:
    """This rank's rows of a global batch; one fewer than another rank's where the batch does not divide evenly."""
    return slice(rank(), None, world())


def summed(value: float) -> float:
    """The sum of a number over all ranks."""
    if world() == 1:
        return value
    import torch

    return summed_tensor(torch.tensor(value, dtype=torch.float64)).item()


def summed_tensor(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on the CPU where there are several."""
    if world() == 1:
        return tensor
    import torch
    import torch.distributed as dist

    with torch.inference_mode(False):  # inference tensors cannot be received into
        total = tensor.detach().cpu().clone()
        dist.all_reduce(total)
    return total


def mean(value: float) -> float:
    """The mean of a number over all ranks, the same on each."""
    return summed(value) / world()


def gathered(part: Tensor, count: int) -> Tensor:
    """All rows (count, ...) of a tensor on the CPU, of which every rank has its `rows()`."""
    if world() == 1:
        return part
    import torch
    import torch.distributed as dist

    most = -(-count // world())
    padded = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])]).contiguous()
    if not padded.numel():  # old versions of gloo crash on it
        return part.new_zeros(count, *part.shape[1:])
    flat = padded.reshape(-1).view(torch.uint8)  # gloo does not support every type
    with torch.inference_mode(False):  # inference tensors cannot be received into
        parts = [torch.empty_like(flat) for _ in range(world())]
        dist.all_gather(parts, flat)
    return torch.stack([p.view(part.dtype).view_as(padded) for p in parts], dim=1).flatten(0, 1)[:count]


def rank_zero_only(function: Callable[Arguments, Any]) -> Callable[Arguments, None]:
    """Make a function, such as one that writes a file, do nothing on other ranks than 0."""

    @wraps(function)
    def on_rank_zero(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if rank() == 0:
            function(*args, **kwargs)

    return on_rank_zero


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """A block, such as a download, that rank 0 finishes before the others enter it."""
    if rank() > 0:
        summed(0.0)
    yield
    if rank() == 0:
        summed(0.0)
