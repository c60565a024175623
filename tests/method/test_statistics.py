"""Intervals against simulated data sets, variances in closed form, and p-values and areas against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pdiff.method import statistics
from pdiff.method.statistics import (
    Comparison,
    holm,
    hypervolume,
    hypervolume_interval,
    mean_replicates,
    median_replicates,
    pareto_front,
    slope_replicates,
)
from pdiff.seeds import stream

REFERENCE = torch.tensor([0.0, 0.0])


def compare(a: Tensor, b: Tensor, *, seed: int, resamples: int = 1000, level: float = 0.95) -> Comparison:
    """The means of two groups."""
    first, second = (
        mean_replicates(x, seed=stream(seed, name), resamples=resamples) for name, x in {"a": a, "b": b}.items()
    )
    return first.compare(second, level=level)


def networks(count: int, images: Tensor, *, mean: float, spread: float, generator: torch.Generator) -> Tensor:
    """Right predictions of networks that differ by `spread`, on images that differ in how hard they are, in logits."""
    logits = mean + spread * torch.randn(count, 1, generator=generator) + images
    return torch.rand(count, len(images), generator=generator) < logits.sigmoid()


def expected_accuracy(mean: float, variance: float) -> float:
    """Expectation of a logistic function of a normal number, by Gauss-Hermite quadrature."""
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    return float((weights / math.sqrt(2 * math.pi) / (1 + np.exp(-mean - math.sqrt(variance) * x))).sum())


@pytest.mark.parametrize(
    ("count", "spread", "hardness"), [(20, 0.3, 2.0), (20, 0.0, 0.0), (8, 0.5, 2.0), (1, 0.0, 2.0)]
)
@pytest.mark.slow
def test_intervals_of_accuracy_cover_the_truth(count: int, spread: float, hardness: float) -> None:
    g, covered, errors, found = torch.Generator().manual_seed(0), 0, [], []
    accuracies = [expected_accuracy(mean, spread**2 + hardness**2) for mean in (1.0, 1.3)]
    for seed in range(200):
        images = hardness * torch.randn(100, generator=g)
        groups = [networks(count, images, mean=mean, spread=spread, generator=g) for mean in (1.0, 1.3)]
        comparison = compare(*groups, seed=seed, resamples=60)
        covered += comparison.low <= accuracies[0] - accuracies[1] <= comparison.high
        errors.append((comparison.high - comparison.low) / 2 / 1.96)
        found.append(comparison.difference)
    assert 0.90 <= covered / 200 <= 0.99
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)  # and are no wider than they must be


@pytest.mark.parametrize("block", [32 * 50 * 300, 1 << 26])
def test_the_error_of_accuracy_is_that_of_the_two_way_analysis_of_variance(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BLOCK_BYTES", block)
    g = torch.Generator().manual_seed(0)
    images = 2 * torch.randn(50, generator=g)
    a, b = (networks(n, images, mean=mean, spread=0.5, generator=g) for n, mean in [(9, 1.0), (6, 1.5)])
    difference = a.double().mean(dim=0) - b.double().mean(dim=0)
    variance = difference.var().item() / 50
    for right in (a.double(), b.double()):
        n, of_network, of_image = len(right), right.mean(dim=1, keepdim=True), right.mean(dim=0)
        residual = (right - of_network - of_image + right.mean()).square().sum().item() / ((n - 1) * 49)
        variance += of_network.var().item() / n - residual / (n * 50)
    found = compare(a, b, seed=0, resamples=5000)
    assert found.difference == pytest.approx(difference.mean().item())
    assert (found.high - found.low) / 2 / 1.959964 == pytest.approx(math.sqrt(variance), rel=0.04)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.difference) / math.sqrt(variance)), rel=0.3)


def test_equal_groups_do_not_differ_and_better_ones_do() -> None:
    g = torch.Generator().manual_seed(0)
    images = 2 * torch.randn(300, generator=g)
    a, copy, better = (networks(30, images, mean=mean, spread=0.2, generator=g) for mean in (1, 1, 2))
    assert compare(a, copy, seed=0).verdict() == "no difference"
    itself = compare(a, a, seed=0)
    assert itself.difference == 0 and itself.p == 1 and itself.low == -itself.high < 0
    found = compare(better, a, seed=0)
    assert found.verdict() == "better" and found.p < 1e-6 and found.low > 0
    assert compare(a, better, seed=0).verdict() == "worse"
    assert compare(better, a, seed=0) == found != compare(better, a, seed=1)
    narrow, wide = (compare(better, a, seed=0, level=level) for level in (0.5, 0.99))
    assert wide.low < found.low < narrow.low < narrow.difference < narrow.high < found.high < wide.high


def test_a_difference_without_variation_is_certain() -> None:
    a, b = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    certain = compare(a, b, seed=0)
    assert certain == Comparison(1, 1, 1, 0) and certain.verdict() == "better"


@pytest.mark.slow
def test_intervals_of_one_group_cover_the_truth() -> None:
    g, means, medians = torch.Generator().manual_seed(0), 0, 0
    for seed in range(200):
        x = 0.3 + torch.randn(30, generator=g)
        for found, covered in (
            (mean_replicates(x, seed=seed, resamples=100), 0),
            (median_replicates(x, seed=seed, resamples=100), 1),
        ):
            low, high = found.interval()
            means += (not covered) * (low <= 0.3 <= high)
            medians += covered * (low <= 0.3 <= high)
    assert 0.90 <= means / 200 <= 0.99 and 0.90 <= medians / 200 <= 0.99


@pytest.mark.parametrize(("n", "m"), [(10, 10), (30, 12)])
@pytest.mark.slow
def test_intervals_of_means_cover_the_truth(n: int, m: int) -> None:
    g, covered = torch.Generator().manual_seed(0), 0
    for seed in range(600):
        a, b = 0.3 + torch.randn(n, generator=g), 2 * torch.randn(m, generator=g)
        found = compare(a, b, seed=seed, resamples=200)
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 600 <= 0.99


def test_the_error_of_means_is_that_of_welch() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = 1 + torch.randn(7, generator=g), 3 * torch.randn(12, generator=g)
    found = compare(a, b, seed=0, resamples=20_000)
    assert found.difference == pytest.approx((a.mean() - b.mean()).item(), rel=1e-5)
    assert (found.high - found.low) / 2 / 1.959964 == pytest.approx(
        (a.var() / 7 + b.var() / 12).sqrt().item(), rel=0.02
    )


def test_verdicts_follow_the_adjusted_p() -> None:
    comparison = Comparison(difference=-0.1, low=-0.2, high=-0.01, p=0.02)
    assert comparison.verdict() == "worse" and comparison.verdict(alpha=0.01) == "no difference"
    assert comparison._replace(difference=0.1).verdict() == "better"
    assert comparison._replace(p=holm([0.02, 0.03, 0.04])[0]).verdict() == "no difference"
    assert comparison._replace(p=math.nan).verdict() == "no difference"


@pytest.mark.parametrize("seed", range(5))
def test_holm_against_its_definition(seed: int) -> None:
    p = (torch.rand(6, generator=torch.Generator().manual_seed(seed)) / 4).tolist()
    p[3] = p[1]

    def rejected(alpha: float) -> set[int]:
        """Step down: reject the smallest p-values as long as p <= alpha / (those left)."""
        found, left = set(), sorted(range(6), key=p.__getitem__)
        while left and p[left[0]] * len(left) <= alpha:
            found.add(left.pop(0))
        return found

    adjusted = holm(p)
    for alpha in [step / 200 + 1e-5 for step in range(199)]:
        assert rejected(alpha) == {i for i in range(6) if adjusted[i] <= alpha}
    assert holm([]) == [] and holm([0.03]) == [0.03] and holm([0.9, 0.8]) == [1, 1]
    assert holm([0.01, math.nan, 0.04])[::2] == [0.02, 0.04] and math.isnan(holm([math.nan])[0])


def grid(count: int, seed: int) -> Tensor:
    return torch.randint(-2, 12, (count, 2), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_against_a_loop(seed: int) -> None:
    points = grid(25, seed)
    pairs = [tuple(point) for point in points.tolist()]
    expected = [not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in pairs) for p in pairs]
    assert pareto_front(points).tolist() == expected
    assert pareto_front(torch.tensor([[1.0, 1.0], [1, 1], [math.nan, 9]])).tolist() == [True, True, False]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [0, 1, 8, 30])
def test_hypervolume_against_counted_cells(count: int, seed: int) -> None:
    points = grid(count, seed)
    cells = itertools.product(range(12), repeat=2)
    expected = sum(any(x < p[0] and y < p[1] for p in points.tolist()) for x, y in cells)
    assert hypervolume(points, REFERENCE) == expected
    assert hypervolume(points[pareto_front(points)] + 5, REFERENCE + 5) == expected


def test_hypervolume_ignores_what_is_nan() -> None:
    points = torch.tensor([[2.0, 1.0], [math.nan, 9.0], [9.0, math.nan]])
    assert hypervolume(points, REFERENCE) == 2


def test_hypervolume_of_resamples_against_its_expectation() -> None:
    points = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0], [0.5, 0.5]])
    areas = [hypervolume(points[list(drawn)], REFERENCE) for drawn in itertools.product(range(4), repeat=3)]
    value, low, high = hypervolume_interval(points, REFERENCE, size=3, seed=0, resamples=20_000)
    assert value == pytest.approx(np.mean(areas), rel=0.01)
    assert [low, high] == np.quantile(areas, [0.025, 0.975]).tolist()
    assert hypervolume_interval(points[1:2], REFERENCE, size=5, seed=0) == (4, 4, 4)


def test_hypervolumes_of_groups_of_different_sizes_compare() -> None:
    g = torch.Generator().manual_seed(0)
    few, many = (3 + torch.randn(n, 2, generator=g) for n in (200, 2000))
    (value, low, high), (other, *_) = (hypervolume_interval(x, REFERENCE, size=40, seed=0) for x in (few, many))
    assert low < other < high and value == pytest.approx(other, rel=0.1)
    assert hypervolume(many, REFERENCE) > high  # of all points, the larger group wins for its size alone


def test_slopes_against_least_squares_and_their_interval_against_its_theory() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.uniform(-1, 2, 400), rng.normal(0, 0.5, 400)
    expected = stats.linregress(x, 3 * x + noise)
    found = slope_replicates(torch.from_numpy(x), torch.from_numpy(3 * x + noise), seed=0)
    assert found.value == pytest.approx(expected.slope)
    low, high = found.interval()
    assert (low + high) / 2 == pytest.approx(found.value)
    assert (high - low) / 2 == pytest.approx(1.96 * expected.stderr, rel=0.1)
    assert math.isnan(slope_replicates(torch.ones(5), torch.rand(5), seed=0).value)
