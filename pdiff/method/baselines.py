"""Baselines: networks that need no generator. BASELINES lists them; importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pdiff.method.collection import Collection
    from pdiff.method.standardize import Standardizer


def noisy(collection: Collection, standardizer: Standardizer, *, scale: float, seed: int) -> Collection:
    """Originals whose standardised tensors get N(0, scale^2) (method, section 5)."""
    import torch

    vectors = standardizer.encode(collection)
    generator = torch.Generator().manual_seed(seed)
    return standardizer.decode(vectors + scale * torch.randn(vectors.shape, generator=generator))


def average(collection: Collection) -> Collection:
    """One network whose parameters are the mean of the originals (the paper's ensemble; method, section 5)."""
    return collection.map(_mean)


def _mean(stacked: Tensor) -> Tensor:
    """Mean over checkpoints, (1, *shape); integer tensors keep the first checkpoint's value."""
    if not stacked.is_floating_point():
        return stacked[:1]
    return stacked.double().mean(dim=0, keepdim=True).to(stacked.dtype)


BASELINES: dict[str, Callable[[Collection], Collection]] = {"average": average}
"""Name of the group -> its networks, computed from the originals."""
