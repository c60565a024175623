"""Convolutions of stride 2 and batch normalisation that train fast on a CPU.

oneDNN computes a convolution and the gradient of its input at the speed of a matrix product where the channels of a
position lie side by side in memory, but the gradient of its weights at half of that; as a matrix product with the
windows of the input it is fast, too. Elsewhere, and outside training, these are the modules of PyTorch; results agree
to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff import compat

WINDOW_BYTES = 4 << 20  # of windows that are multiplied together: they fit in a cache
STRIDE = {"stride": (1, 2)}


class Down(nn.Conv1d):
    """Convolution of odd kernel size to half the length, (B, C, L) -> (B, C', L / 2); L is even.

    Args:
        inputs: C.
        outputs: C'.
        kernel_size: of the window about every second position.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__(inputs, outputs, kernel_size, stride=2, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        if not _fast(self, x):
            return super().forward(x)
        if x.shape[1] == 1:  # the windows are no larger than the output
            windows = F.pad(x[:, 0], self.padding * 2).unfold(1, *self.kernel_size, *self.stride)
            return F.linear(windows, self.weight[:, 0], self.bias).transpose(1, 2)
        return _Down.apply(x, self.weight, self.bias)


class Up(nn.ConvTranspose1d):
    """Transposed convolution of odd kernel size to twice the length, (B, C, L) -> (B, C', 2 L).

    Args:
        inputs: C.
        outputs: C'.
        kernel_size: of the window about every second position.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__(inputs, outputs, kernel_size, stride=2, padding=kernel_size // 2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _Up.apply(x, self.weight, self.bias) if _fast(self, x) else super().forward(x)


class Norm(nn.BatchNorm1d):
    """Batch normalisation of (B, C, L), fast where the channels of a position lie side by side."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fast(self, x):
            return super().forward(x)
        positions = x.transpose(1, 2)
        return super().forward(positions.flatten(0, 1)).view(positions.shape).transpose(1, 2)


def _fast(module: nn.Module, x: Tensor) -> bool:
    """Whether a module is trained in float32 on a CPU."""
    return module.training and x.device.type == "cpu" and x.dtype == torch.float32 and not compat.cpu_autocast()


class _Down(torch.autograd.Function):
    """The convolution of `Down`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _down(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return _up(gradient, weight), _weight_gradient(x, gradient, weight.shape[2]), gradient.sum((0, 2))


class _Up(torch.autograd.Function):
    """The transposed convolution of `Up`: forward and backward are those of `_Down` exchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _up(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return _down(gradient, weight), _weight_gradient(gradient, x, weight.shape[2]), gradient.sum((0, 2))


def _down(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, L) -> (B, C', L / 2), weight (C', C, k)."""
    return F.conv2d(_side_by_side(x), weight[:, :, None], bias, padding=(0, weight.shape[2] // 2), **STRIDE)[:, :, 0]


def _up(y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C', L / 2) -> (B, C, L), weight (C', C, k): the transpose of `_down`."""
    padding = {"padding": (0, weight.shape[2] // 2), "output_padding": (0, 1)}
    return F.conv_transpose2d(_side_by_side(y), weight[:, :, None], bias, **padding, **STRIDE)[:, :, 0]


def _weight_gradient(x: Tensor, y: Tensor, kernel_size: int) -> Tensor:
    """The gradient of <`_down`(x), y> by the weight, (C', C, k), of x (B, C, L) and y (B, C', L / 2)."""
    channels, outputs = x.shape[1], y.shape[1]
    y = _side_by_side(y).permute(0, 2, 3, 1).flatten(1, 2)  # (B, L / 2, C')
    total = x.new_zeros(kernel_size * channels, outputs)
    for samples, windows in _windows(x, kernel_size):
        total.addmm_(windows.T, y[samples].flatten(0, 1))
    return total.view(kernel_size, channels, outputs).permute(2, 1, 0)


def _windows(x: Tensor, length: int) -> Iterator[tuple[slice, Tensor]]:
    """Windows of x (B, C, L) about every second position, (b L / 2, length C), of a few samples at a time."""
    x = F.pad(x.transpose(1, 2), (0, 0, length // 2, length // 2)).contiguous()
    count = (x.shape[1] - length) // 2 + 1
    view = x.as_strided((len(x), count, length * x.shape[2]), (x[0].numel(), 2 * x.shape[2], 1))
    rows = max(1, WINDOW_BYTES // (4 * view[0].numel()))
    for first in range(0, len(x), rows):
        samples = slice(first, min(first + rows, len(x)))
        yield samples, view[samples].flatten(0, 1)


def _side_by_side(x: Tensor) -> Tensor:
    """x (B, C, L) as (B, C, 1, L), the channels of a position side by side."""
    return x[:, :, None].contiguous(memory_format=torch.channels_last)
