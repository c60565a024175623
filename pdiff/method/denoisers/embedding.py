"""The embedding of timesteps that all denoisers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SINUSOIDS = 256  # method, section 4


def sinusoids(t: Tensor, size: int = SINUSOIDS) -> Tensor:
    """Sinusoidal embedding of timesteps (B,), (B, size): cosines and sines of periods 2 pi .. 2 pi 10 000.

    The positional encoding of Vaswani et al. 2017 (arXiv 1706.03762, section 3.5), cosines first.
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
