"""Statistics of comparisons: the bootstrap over networks and images, Holm's correction, fronts and hypervolumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pdiff.seeds import stream

RESAMPLES = 1000
LEVEL = 1.959964  # standard errors on either side of a 95 % interval


class Comparison(NamedTuple):
    """The difference of two groups, its 95 % interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, eq=False)
class Replicates:
    """A statistic of a group of networks, and its bootstrap replicates.

    Intervals are normal ones with the bootstrap standard error (Efron & Tibshirani 1993, chapter 13), so that p-values
    below 1 / RESAMPLES exist.

    Attributes:
        value: the statistic.
        samples: its replicates, (RESAMPLES,).
    """

    value: float
    samples: Tensor

    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        error = LEVEL * self.samples.std().item()
        return self.value - error, self.value + error

    def compare(self, other: Replicates) -> Comparison:
        """This statistic minus that of another group; paired where both groups were resampled on the same images."""
        difference, error = self.value - other.value, (self.samples - other.samples).std().item()
        p = math.erfc(abs(difference) / error / 2**0.5) if error > 0 else float(difference == 0)
        return Comparison(difference, difference - LEVEL * error, difference + LEVEL * error, p)


def mean_replicates(values: Tensor, *, seed: int) -> Replicates:
    """The mean of a number of each network, or of one of each network and image.

    In two dimensions networks and images are resampled independently of each other, which takes account of both
    samples and is slightly conservative (the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111). All groups of one seed
    meet the same resamples of the images: differences are paired.

    Args:
        values: (N,), or (N, images), of any type.
        seed: of the resampling; different for each group, as its networks are independent of those of others.
    """
    counts = _counts(len(values), stream(seed, "networks"))  # (R, N)
    if values.ndim == 1:
        return Replicates(values.double().mean().item(), counts.double() @ values.double() / len(values))
    rows = counts @ values.float() / len(values)  # (R, images)
    weights = _image_counts(values.shape[1])
    return Replicates(values.double().mean().item(), (rows * weights).mean(dim=1, dtype=torch.float64))


def median_replicates(values: Tensor, *, seed: int) -> Replicates:
    """The median of a number of each network, (N,)."""
    generator = torch.Generator().manual_seed(stream(seed, "networks"))
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    return Replicates(values.quantile(0.5).item(), values[drawn].quantile(0.5, dim=1).double())


def _counts(n: int, seed: int) -> Tensor:
    """How often each of n things is in every resample, float32 (RESAMPLES, n); the rows have the sum n."""
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(RESAMPLES, n).scatter_add_(1, drawn, torch.ones(1, 1).expand_as(drawn))


@lru_cache(maxsize=2)
def _image_counts(images: int) -> Tensor:
    """As `_counts`, the same for all groups of networks."""
    return _counts(images, stream(0, "images"))


def holm(p: Sequence[float]) -> list[float]:
    """P-values of a family of comparisons, adjusted so that one bound holds for all of them (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda k: p[k])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[k]))
        adjusted[k] = largest
    return adjusted


def pareto_front(points: Tensor) -> Tensor:
    """Which points are on the front, bool (n,): no other is as good in both, and better in one; larger is better.

    Args:
        points: (n, 2).
    """
    as_good = (points[:, None] >= points).all(dim=2)
    better = (points[:, None] > points).any(dim=2)
    return ~(as_good & better).any(dim=0)


def hypervolume(points: Tensor, reference: Tensor) -> Tensor:
    """Area between a reference point and the points above it in both coordinates (Zitzler & Thiele 1999).

    Args:
        points: (..., n, 2); larger is better.
        reference: (2,).

    Returns:
        Areas, (...).
    """
    above = (points.double() - reference).clamp(min=0)
    order = above[..., 0].argsort(dim=-1, descending=True)
    x, y = above.gather(-2, order[..., None].expand(above.shape)).unbind(-1)
    width = x - torch.cat([x[..., 1:], torch.zeros_like(x[..., :1])], dim=-1)
    return (width * y.cummax(dim=-1).values).sum(dim=-1)


def hypervolume_interval(
    points: Tensor, reference: Tensor, *, size: int, seed: int, level: float = 0.95
) -> tuple[float, float, float]:
    """The mean hypervolume of `size` networks, and its percentile interval, by the bootstrap over networks.

    Every resample has the same size, so that groups of different sizes compare.

    Args:
        points: one for each network, (n, 2).
        reference: (2,).
        size: networks in a resample.
        seed: of the resampling.
        level: of the interval.
    """
    generator = torch.Generator().manual_seed(stream(seed, "front"))
    areas = hypervolume(points[torch.randint(len(points), (RESAMPLES, size), generator=generator)], reference)
    low, high = areas.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=areas.dtype)).tolist()
    return areas.mean().item(), low, high
