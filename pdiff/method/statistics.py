"""Whether a difference between groups of networks is more than chance, and fronts of two objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pdiff.seeds import stream

BLOCK_BYTES = 64 << 20  # of resamples at a time
RESAMPLES = 1000


class Comparison(NamedTuple):
    """A difference between two groups, a - b.

    Attributes:
        difference: as measured.
        low, high: confidence interval.
        p: two-sided p-value of no difference.
    """

    difference: float
    low: float
    high: float
    p: float

    def verdict(self, *, alpha: float = 0.05) -> Literal["better", "worse", "no difference"]:
        """What the p-value says of a at level alpha; of several comparisons, adjust the p-values first (`holm`)."""
        if not self.p < alpha:
            return "no difference"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True, eq=False)
class Replicates:
    """A statistic of a group of networks, and its bootstrap replicates.

    Intervals are normal ones with the bootstrap's standard error, so that p-values below 1 / R exist.

    Attributes:
        value: the statistic.
        samples: its replicates, float64 (R,).
        excess: how much their variance is too large, see `mean_replicates`.
    """

    value: float
    samples: Tensor
    excess: float = 0.0

    def interval(self, *, level: float = 0.95) -> tuple[float, float]:
        """The interval of the statistic, to be expected of other networks and images."""
        found = self.compare(Replicates(0.0, torch.zeros_like(self.samples)), level=level)
        return found.low, found.high

    def compare(self, other: Replicates, *, level: float = 0.95) -> Comparison:
        """This statistic minus that of another group of networks; paired where both were measured on the same images.

        With five networks or fewer in a group, 95 % intervals hold the truth in 86 to 91 % of cases.
        """
        variance = (self.samples - other.samples).var().item()
        error = max(variance - self.excess - other.excess, variance / 3) ** 0.5
        difference, reach = self.value - other.value, NormalDist().inv_cdf((1 + level) / 2) * error
        certain = 0.0 if difference else 1.0  # where nothing varies
        p = math.erfc(abs(difference) / error / math.sqrt(2)) if error else certain
        return Comparison(difference, difference - reach, difference + reach, p)


def mean_replicates(values: Tensor, *, seed: int, resamples: int = RESAMPLES) -> Replicates:
    """The mean of a number of each network, or of right predictions of each network on each image.

    Networks are drawn again, and independently of them images ("pigeonhole bootstrap", Owen 2007, The Annals of Applied
    Statistics 1(2)), n - 1 of n, which makes the variances of networks and of images unbiased (Rao & Wu 1988, JASA 83).
    With the variances s_N of N networks, s_I of I images and s_E of their interaction, the variance of the resamples is
    s_N / N + s_I / I + 3 s_E / (N I), that of the mean has s_E once. The excess is taken off: where networks err
    independently of each other, intervals would be sqrt(3) times too wide. Of a single network the variance is that of
    images alone. All groups meet the same resamples of the images.

    Args:
        values: numbers (N,), or bool (N, images).
        seed: of the networks' resamples; another one for each group, whose networks are not those of others.
        resamples: R. The standard error is uncertain by 1 / sqrt(2 R) of itself.
    """
    weights, value = _weights(resamples, len(values), stream(seed, "networks")), values.double().mean().item()
    if values.ndim == 1:
        return Replicates(value, weights.double() @ values.double())
    images = _image_weights(resamples, values.shape[1])
    columns = max(1, BLOCK_BYTES // (4 * (resamples + len(values))))
    blocks = zip(values.split(columns, dim=1), images.split(columns, dim=1), strict=True)
    samples = sum(((weights @ right.float()) * v).sum(dim=1, dtype=torch.float64) for right, v in blocks)
    return Replicates(value, samples, 2 * _interaction(values.float()))


def median_replicates(values: Tensor, *, seed: int, resamples: int = RESAMPLES) -> Replicates:
    """The median of a number of each network, (N,); networks are drawn again."""
    generator = torch.Generator().manual_seed(stream(seed, "networks"))
    drawn = values[torch.randint(len(values), (resamples, len(values)), generator=generator)]
    return Replicates(values.quantile(0.5).item(), drawn.quantile(0.5, dim=1).double())


def slope_replicates(x: Tensor, y: Tensor, *, seed: int, resamples: int = RESAMPLES) -> Replicates:
    """The slope of the least-squares line of y over x, of networks (N,); networks are drawn again.

    NaN where all x are equal.
    """
    generator = torch.Generator().manual_seed(stream(seed, "networks"))
    drawn = torch.randint(len(x), (resamples, len(x)), generator=generator)
    return Replicates(_slope(x, y).item(), _slope(x[drawn], y[drawn]))


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """Slopes of the lines through points (..., N), float64."""
    x, y = x.double(), y.double()
    x = x - x.mean(dim=-1, keepdim=True)
    return (x * y).sum(dim=-1) / x.square().sum(dim=-1)


def _interaction(right: Tensor) -> float:
    """What networks times images add to the variance of a mean of 0s and 1s (N, I): the residual mean square over N I.

    The residual of the two-way analysis of variance; 0 for a single network or image.
    """
    networks, images = right.mean(dim=1).double(), right.mean(dim=0).double()
    mean = networks.mean()
    residual = mean + mean.square() - networks.square().mean() - images.square().mean()
    return residual.clamp(min=0).item() / max(1, (right.shape[0] - 1) * (right.shape[1] - 1))


def _weights(count: int, n: int, seed: int) -> Tensor:
    """Weights of n items in each of `count` resamples of n - 1 of them (of one: itself), float32 (count, n)."""
    draws, generator = max(1, n - 1), torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (count, draws), generator=generator)
    return torch.zeros(count, n).scatter_add_(1, drawn, torch.ones(1, 1).expand(count, draws)) / draws


@lru_cache(maxsize=2)
def _image_weights(count: int, images: int) -> Tensor:
    """As `_weights`; the same for all groups of networks."""
    return _weights(count, images, stream(0, "images"))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, so that the chance of any false discovery stays below alpha (Holm 1979).

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_j).

    Args:
        p: in any order. NaN, of what could not be compared, is not counted and stays.
    """
    order = sorted((i for i, value in enumerate(p) if not math.isnan(value)), key=p.__getitem__)
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def pareto_front(points: Tensor) -> Tensor:
    """Which points no other one beats: as good in both objectives, and better in one.

    Args:
        points: (n, 2), larger is better.

    Returns:
        bool (n,). Equal points stand or fall together; a point with NaN is never on the front.
    """
    x, y = points.unbind(dim=1)
    as_good = (x >= x[:, None]) & (y >= y[:, None])
    better = (x > x[:, None]) | (y > y[:, None])
    return ~(as_good & better).any(dim=1) & ~points.isnan().any(dim=1)


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Area that points dominate above a reference (Zitzler & Thiele 1998), exact.

    Args:
        points: (n, 2), larger is better.
        reference: (2,); points that do not exceed it in both objectives add nothing.
    """
    return _areas(points, reference).item()


def hypervolume_interval(
    points: Tensor, reference: Tensor, *, size: int, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """Hypervolume that `size` networks reach, so that groups of different sizes compare.

    The hypervolume grows with the number of points; each resample therefore has `size` of them, drawn with
    replacement. Points that are drawn twice make the mean too low: of n normal points by 10 % at size n, 5 % at n / 2,
    2 % at n / 4. So `size` should be at most a quarter of the smallest group.

    Args:
        points: one network each, (n, 2), larger is better.
        reference: (2,).
        size: networks in a resample.
        seed: of the resamples.
        resamples: number of them.
        level: of the interval.

    Returns:
        Mean over resamples, and the quantiles between which the share `level` of them lies: where the hypervolume of
        `size` networks falls, not how well its mean is known.
    """
    generator = torch.Generator().manual_seed(stream(seed, "bootstrap"))
    drawn = torch.randint(len(points), (resamples, size), generator=generator).to(points.device)
    areas = _areas(points[drawn], reference)
    low, high = areas.quantile(areas.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return areas.mean().item(), low, high


def _areas(points: Tensor, reference: Tensor) -> Tensor:
    """Hypervolumes of sets of points (..., n, 2): strips from the largest x down, each as high as the best y so far."""
    points = points.double()
    above = torch.where((points > reference).all(dim=-1, keepdim=True), points - reference.double(), 0.0)
    x, order = above[..., 0].sort(dim=-1, descending=True)
    height = above[..., 1].gather(-1, order).cummax(dim=-1).values
    width = x - torch.nn.functional.pad(x[..., 1:], (0, 1))
    return (width * height).sum(dim=-1)
