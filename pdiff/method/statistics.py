"""Whether a difference between groups of networks is more than chance, and fronts of two objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pdiff.seeds import stream

BLOCK_BYTES = 64 << 20  # of resamples at a time


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


def compare_accuracy(
    right_a: Tensor,
    right_b: Tensor,
    *,
    seed: int,
    resamples: int = 1000,
    paired: bool = True,
    level: float = 0.95,
) -> Comparison:
    """Difference of the mean accuracies of two groups of networks, to be expected of other networks and images.

    Networks of each group and images are drawn again, each with replacement and independently ("pigeonhole bootstrap",
    Owen 2007, The Annals of Applied Statistics 1(2)), n - 1 of n, which makes the variances of networks and of images
    unbiased (Rao & Wu 1988, JASA 83). With the variances s_N of N networks, s_I of I images and s_E of their
    interaction, the variance of the resamples is s_N / N + s_I / I + 3 s_E / (N I), that of the mean has s_E once.
    The excess is taken off: where networks err independently of each other, intervals would be sqrt(3) times too wide.
    The interval is normal, so that p-values below 1 / resamples exist; with five networks or fewer in a group, 95 %
    intervals hold the truth in 86 to 91 % of cases. Of a single network the variance is that of images alone.

    Args:
        right_a: right predictions, bool (A, I).
        right_b: right predictions, bool (B, I), of networks that are not those of a.
        seed: of the resamples.
        resamples: number of them, R. The standard error is uncertain by 1 / sqrt(2 R) of itself.
        paired: both groups saw the same images in the same order; False: other images, of any number.
        level: of the interval.

    Raises:
        ValueError: if paired groups do not have equally many images.
    """
    if paired and right_a.shape[1] != right_b.shape[1]:
        found = f"{right_a.shape[1]} and {right_b.shape[1]}"
        raise ValueError(f"paired groups must have the same images, but got {found} of them")
    generator = torch.Generator().manual_seed(stream(seed, "bootstrap"))
    groups = [right.float() for right in (right_a, right_b)]
    rows = max(1, BLOCK_BYTES // (32 * max(1, *right_a.shape, *right_b.shape)))
    differences = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        networks = [_weights(count, len(right), generator) for right in groups]
        images = [_weights(count, right.shape[1], generator) for right in groups[: 1 if paired else 2]]
        a, b = (
            ((u.to(right) @ right) * v.to(right)).sum(dim=1)
            for u, v, right in zip(networks, images * 2 if paired else images, groups, strict=True)
        )
        differences.append((a - b).double())
    variance = torch.cat(differences).var().item()
    excess = 2 * sum(map(_interaction, groups))
    measured = right_a.double().mean() - right_b.double().mean()
    return _normal(measured.item(), max(variance - excess, variance / 3) ** 0.5, level=level)


def _interaction(right: Tensor) -> float:
    """What networks times images add to the variance of a mean of 0s and 1s (N, I): the residual mean square over N I.

    The residual of the two-way analysis of variance; 0 for a single network or image.
    """
    networks, images = right.mean(dim=1).double(), right.mean(dim=0).double()
    mean = networks.mean()
    residual = mean + mean.square() - networks.square().mean() - images.square().mean()
    return residual.clamp(min=0).item() / max(1, (right.shape[0] - 1) * (right.shape[1] - 1))


def compare_means(a: Tensor, b: Tensor, *, seed: int, resamples: int = 1000, level: float = 0.95) -> Comparison:
    """Difference of the means of two groups of numbers, one for each network, to be expected of other networks.

    The bootstrap of `compare_accuracy`, over networks only. The interval is normal: with five networks in each group,
    95 % intervals hold the truth in 91 % of cases, with ten in 93 %.

    Args:
        a: (A,).
        b: (B,), of other networks.
        seed: of the resamples.
        resamples: number of them.
        level: of the interval.
    """
    generator = torch.Generator().manual_seed(stream(seed, "bootstrap"))
    means = [_weights(resamples, len(x), generator).to(x.device).double() @ x.double() for x in (a, b)]
    measured = a.double().mean() - b.double().mean()
    return _normal(measured.item(), (means[0] - means[1]).std().item(), level=level)


def _weights(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Weights of n items in each of `count` resamples of n - 1 of them (of one: itself), float32 (count, n)."""
    draws = max(1, n - 1)
    drawn = torch.randint(n, (count, draws), generator=generator)
    return torch.zeros(count, n).scatter_add_(1, drawn, torch.ones(1, 1).expand(count, draws)) / draws


def _normal(difference: float, error: float, *, level: float) -> Comparison:
    """Interval and two-sided p-value of a normal difference with its standard error."""
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    certain = 0.0 if difference else 1.0  # where nothing varies
    p = math.erfc(abs(difference) / error / math.sqrt(2)) if error else certain
    return Comparison(difference, difference - reach, difference + reach, p)


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
