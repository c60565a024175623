"""Data-parallel training: each rank handles a shard of every batch; the result is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from pdiff.errors import UserError
from pdiff.parallel.ranks import rows, world


def shared(module: nn.Module, loss: Callable[[Any], Tensor], count: int) -> Callable[[Any], Tensor]:
    """A loss of this rank's rows whose gradients are those of the global batch's loss, on every rank.

    Its values are such that their mean over the ranks is the loss of the global batch. Batch normalisation measures the
    global batch; `torch.randn_like` and `torch.rand_like` of a tensor with one row for each of this rank's rows return
    those rows of what one process would sample for the global batch. Dropout differs from that of one process.

    Args:
        module: what is trained.
        loss: rows -> their mean loss.
        count: rows of the global batch.

    Raises:
        UserError: fewer rows than ranks.
    """
    if world() == 1:
        return loss
    if count < world():
        raise UserError(f"processes {world()}: a batch has only {count} rows, expected at least one a process")
    weight = len(range(count)[rows()]) * world() / count
    objective = _Objective(module, lambda batch: weight * loss(batch), count)
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, static_graph=True)


class _Objective(nn.Module):
    """A loss as a module with the parameters that it trains, as DistributedDataParallel expects."""

    def __init__(self, module: nn.Module, loss: Callable[[Any], Tensor], count: int) -> None:
        super().__init__()
        self.trained = nn.ParameterList(p for p in module.parameters() if p.requires_grad)
        self.loss, self.count = loss, count

    def forward(self, batch: Any) -> Tensor:
        with _GlobalBatch(self.count):
            return self.loss(batch)


class _GlobalBatch(TorchFunctionMode):
    """Within it, batch normalisation and random numbers are those of the global batch; no module need be replaced."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.randn_like, torch.rand_like):
            sample = torch.randn if function is torch.randn_like else torch.rand
            return global_random(sample, *args, count=self.count, **kwargs)
        replaced = global_batch_norm if function is F.batch_norm else function
        return replaced(*args, **kwargs)


def global_random(sample: Callable[..., Tensor], like: Tensor, *, count: int, **options: Any) -> Tensor:
    """This rank's rows of random numbers for a global batch.

    Args:
        sample: torch.randn or torch.rand.
        like: this rank's rows of a tensor of the global batch.
        count: rows of the global batch.
        options: of `torch.randn_like`, such as `dtype`.

    Raises:
        ValueError: `like` has another number of rows than this rank's part of the batch.
    """
    mine = len(range(count)[rows()])
    if len(like) != mine:
        raise ValueError(f"random numbers like {tuple(like.shape)}: expected {mine} rows, those of this process")
    options = {"dtype": like.dtype, "device": like.device} | options
    return sample((count, *like.shape[1:]), **options)[rows()]


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
