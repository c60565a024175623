"""What needs no generator: noise on the originals, and their average (method, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from pdiff.method.collection import Collection
from pdiff.method.standardize import Standardizer


def noisy(collection: Collection, standardizer: Standardizer, *, scale: float, seed: int) -> Collection:
    """Originals whose standardised tensors get N(0, scale^2)."""
    vectors = standardizer.encode(collection)
    generator = torch.Generator().manual_seed(seed)
    return standardizer.decode(vectors + scale * torch.randn(vectors.shape, generator=generator))


def average(collection: Collection) -> Collection:
    """The ensemble: one network whose parameters are the mean of the originals."""
    return Collection({name: _mean(tensor) for name, tensor in collection.tensors.items()})


def _mean(stacked: Tensor) -> Tensor:
    """Mean over checkpoints, (1, *shape); integer tensors keep the first checkpoint's value."""
    if not stacked.is_floating_point():
        return stacked[:1]
    return stacked.double().mean(dim=0, keepdim=True).to(stacked.dtype)
