"""`ELU`, faster on a CPU than PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ELU(nn.Module):
    """x where x > 0, else exp(x) - 1 (Clevert et al. 2015, arXiv 1511.07289, eq. 15 with alpha 1).

    On a CPU PyTorch computes expm1, which takes six times as long. What it gains are digits of results near 0, below
    the rounding of those near 1. Only the result is kept for the derivative; on other devices it overwrites x.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _ELU.apply(x) if x.device.type == "cpu" else F.elu(x, inplace=True)


class _ELU(torch.autograd.Function):
    """The derivative is 1 where x > 0, else exp(x) = y + 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(max=0).exp_().sub_(1).add_(x.clamp(min=0))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.clamp(max=0).add_(1).mul_(gradient)
