"""Measures of novelty against loops of plain Python, SciPy, closed forms, and draws that are known to be copies."""

import itertools
import math

import pytest
import torch
from scipy import linalg, stats
from torch import Tensor

from pdiff.method import vectors
from pdiff.method.novelty import (
    Span,
    data_copying,
    disagreement,
    dispersion,
    frechet_distance,
    nearest_two,
    novel_and_performant,
    precision_recall_density_coverage,
    squared_distances,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.double()[:, None] - b.double()).square().sum(dim=2)


@pytest.mark.parametrize("columns", [1, 3, 100])
@pytest.mark.parametrize("count", [1, 6, 40])
def test_distances_against_differences(count: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(5, 7), normal(count, 7, seed=1)
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 8 * (5 + count) * columns)
    assert squared_distances(a, b).dtype == torch.float64
    torch.testing.assert_close(squared_distances(a, b), squares(a, b), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squared_distances(b, b), squares(b, b), rtol=1e-12, atol=1e-12)


def test_distances_far_from_the_origin_keep_their_digits() -> None:
    a, b = (1000 + 1e-3 * normal(4, 500, seed=seed) for seed in (0, 1))
    before = a.clone(), b.clone()
    torch.testing.assert_close(squared_distances(a, b), squares(a, b), rtol=1e-10, atol=0)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    doubles = b.double()
    squared_distances(doubles, doubles)
    assert torch.equal(doubles, before[1].double())


def test_nearest_two_against_sorting() -> None:
    a, b = normal(5, 3), normal(8, 3, seed=1)
    first, second = nearest_two(squared_distances(a, b))
    rows = [sorted(math.dist(x, y) ** 2 for y in b.tolist()) for x in a.tolist()]
    assert first.tolist() == pytest.approx([row[0] for row in rows])
    assert second.tolist() == pytest.approx([row[1] for row in rows])
    own = squared_distances(b, b)
    before = own.clone()
    first, second = nearest_two(own, same=True)
    rows = [sorted(math.dist(b[i], b[j]) ** 2 for j in range(8) if j != i) for i in range(8)]
    assert first.tolist() == pytest.approx([row[0] for row in rows], rel=1e-5)
    assert second.tolist() == pytest.approx([row[1] for row in rows], rel=1e-5)
    assert torch.equal(own, before)


def test_nearest_of_too_few_is_nan() -> None:
    for columns, same, numbers in [(0, False, 0), (1, False, 1), (2, False, 2), (1, True, 0), (2, True, 1)]:
        two = torch.stack(nearest_two(torch.ones(columns if same else 3, columns), same=same))
        assert (~two.isnan()).sum(dim=0).tolist() == [numbers] * two.shape[1]


def z_by_counting(generated: list[float], heldout: list[float]) -> float:
    """Z without ranks: pairs are counted, and the variance is over all ways to divide the pooled distances."""
    n, m = len(generated), len(heldout)

    def u(left: list[float], right: list[float]) -> float:
        return sum((x > y) + (x == y) / 2 for x in left for y in right)

    pooled, values = generated + heldout, []
    for chosen in itertools.combinations(range(n + m), n):
        rest = [pooled[i] for i in range(n + m) if i not in chosen]
        values.append(u([pooled[i] for i in chosen], rest))
    variance = sum((value - n * m / 2) ** 2 for value in values) / len(values)
    return (u(generated, heldout) - n * m / 2) / math.sqrt(variance)


@pytest.mark.parametrize("levels", [3, 1000])
def test_data_copying_against_all_permutations(levels: int) -> None:
    numbers = torch.randint(levels, (9,), generator=torch.Generator().manual_seed(0)).float()
    expected = z_by_counting(numbers[:4].tolist(), numbers[4:].tolist())
    assert data_copying(numbers[:4], numbers[4:]) == pytest.approx(expected)


@pytest.mark.parametrize("levels", [4, 1 << 20])
def test_data_copying_against_scipy(levels: int) -> None:
    g = torch.Generator().manual_seed(levels)
    generated, heldout = (torch.randint(levels, (n,), generator=g) + shift for n, shift in [(60, 1), (45, 0)])
    test = stats.mannwhitneyu(generated, heldout, method="asymptotic", use_continuity=False, alternative="less")
    assert data_copying(generated, heldout) == pytest.approx(stats.norm.ppf(test.pvalue))


def test_data_copying_at_the_edges() -> None:
    one, none = torch.ones(3), torch.ones(0)
    assert math.isnan(data_copying(one, none)) and math.isnan(data_copying(none, one))
    assert math.isnan(data_copying(torch.tensor([1.0, math.nan]), one))
    assert data_copying(one, one) == 0


def test_draws_of_the_same_distribution_are_no_copies_and_copies_are() -> None:
    fitted, heldout, drawn = normal(200, 50, seed=1), normal(100, 50, seed=2), normal(100, 50, seed=3)
    copies = fitted[:100] + 0.01 * normal(100, 50, seed=4)
    far, *near = (nearest_two(squared_distances(x, fitted))[0] for x in (3 * drawn, heldout, drawn, copies))
    assert abs(data_copying(near[1], near[0])) < 2
    assert data_copying(near[2], near[0]) < -10 and data_copying(far, near[0]) > 10


def prdc_by_loops(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    def balls(x: Tensor) -> list[float]:
        return [sorted(math.dist(p, q) for j, q in enumerate(x) if j != i)[k - 1] for i, p in enumerate(x)]

    def inside(x: Tensor, centers: Tensor) -> list[list[bool]]:
        radii = balls(centers)
        return [[math.dist(p, q) < radius for q, radius in zip(centers, radii, strict=True)] for p in x]

    fakes, reals = inside(fake, real), inside(real, fake)
    return {
        "precision": sum(map(any, fakes)) / len(fake),
        "recall": sum(map(any, reals)) / len(real),
        "density": sum(map(sum, fakes)) / (k * len(fake)),
        "coverage": sum(map(any, zip(*fakes, strict=True))) / len(real),
    }


@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (3, 0.5), (5, 1.5)])
def test_precision_recall_density_coverage_against_loops(k: int, scale: float) -> None:
    real, fake = normal(25, 3), scale * normal(18, 3, seed=1)
    matrices = [squared_distances(x, y) for x, y in [(real, real), (fake, real), (fake, fake)]]
    found = precision_recall_density_coverage(*matrices, k=k)
    assert found == pytest.approx(prdc_by_loops(real, fake, k))
    assert precision_recall_density_coverage(*(matrix.sqrt() for matrix in matrices), k=k) == pytest.approx(found)
    assert 0 < found["coverage"] < 1


def test_precision_recall_density_coverage_against_the_authors() -> None:
    prdc = pytest.importorskip("prdc")
    real, fake = normal(200, 8), 0.9 * normal(150, 8, seed=1)
    matrices = [squared_distances(x, y) for x, y in [(real, real), (fake, real), (fake, fake)]]
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    assert precision_recall_density_coverage(*matrices) == pytest.approx(expected)


def test_density_and_coverage_know_their_expectations() -> None:
    real, fake = normal(1000, 4), normal(1000, 4, seed=1)
    found = precision_recall_density_coverage(
        squared_distances(real, real), squared_distances(fake, real), squared_distances(fake, fake), k=5
    )
    assert found["density"] == pytest.approx(1, abs=0.05)  # Naeem et al., lemma 1: exactly 1
    assert found["coverage"] == pytest.approx(1 - 2**-5, abs=0.02)  # lemma 2: 1 - 2^-k for equally many


def test_balls_without_enough_neighbours_are_nan() -> None:
    found = precision_recall_density_coverage(torch.ones(5, 5), torch.ones(6, 5), torch.ones(6, 6))
    assert [name for name, value in found.items() if math.isnan(value)] == ["precision", "density", "coverage"]
    found = precision_recall_density_coverage(torch.ones(9, 9), torch.ones(0, 9), torch.ones(0, 0))
    assert all(map(math.isnan, found.values()))


@pytest.mark.parametrize("columns", [7, 10_000])
def test_span_against_a_singular_value_decomposition(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 8 * 20 * columns)
    x, y = 5 + normal(10, 60), 5 + normal(4, 60, seed=1)
    span, center = Span.fit(x), x.double().mean(dim=0)
    _, values, axes = torch.linalg.svd(x.double() - center, full_matrices=False)
    axes = axes[:9]
    torch.testing.assert_close(span.values, values[:9].square() / 9)
    expected = (y.double() - center) @ axes.T
    torch.testing.assert_close(span.coordinates(y).abs(), expected.abs(), rtol=1e-8, atol=1e-8)  # signs are free
    torch.testing.assert_close(span.coordinates(x), span.fitted, rtol=1e-8, atol=1e-8)
    rest = y.double() - center - expected @ axes
    torch.testing.assert_close(span.outside(y), rest.square().sum(1) / (y.double() - center).square().sum(1))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_averages_lie_inside_the_span_and_other_draws_outside(offset: float) -> None:
    x = offset + normal(20, 2000)
    mixes = torch.rand(6, 20, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    averages = torch.stack([x.mean(dim=0), x[:16].mean(dim=0), x[:2].mean(dim=0), x[3]])
    span = Span.fit(x)
    assert span.fitted.shape == (20, 19)
    assert span.outside(averages).max() < 1e-9 and span.outside(mixes @ x).max() < 1e-9
    assert span.outside(offset + normal(5, 2000, seed=2)).min() > 0.95
    direction = normal(1, 2000, seed=3).double()
    basis = torch.linalg.svd(x.double() - x.double().mean(dim=0), full_matrices=False).Vh[:19]
    orthogonal = x.double().mean(dim=0) + direction - direction @ basis.T @ basis
    assert span.outside(orthogonal).item() == pytest.approx(1)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rank_does_not_count_rounding(offset: float) -> None:
    x = (offset + normal(30, 4) @ normal(4, 500, seed=1)).float()  # on a plane of 4 dimensions, but for rounding
    span = Span.fit(x)
    assert span.coordinates(x).shape == (30, 4) and span.outside(x).max() < 1e-8
    same = Span.fit(torch.full((5, 40), 0.1))
    assert same.fitted.shape == (5, 0) and same.outside(torch.full((1, 40), 0.1)).item() == 0
    assert same.outside(torch.ones(1, 40)).item() == 1


def test_distances_inside_the_span_are_those_of_coordinates() -> None:
    x = normal(12, 300)
    fitted = Span.fit(x).fitted
    torch.testing.assert_close(squared_distances(fitted, fitted), squares(x, x), rtol=1e-9, atol=1e-9)


def test_dispersion_against_standard_deviations() -> None:
    z, fitted = 3 + normal(50, 6).double(), normal(70, 6, seed=1).double() * torch.arange(1, 7)
    overall, each = dispersion(z, fitted)
    torch.testing.assert_close(each, z.std(dim=0) / fitted.std(dim=0))
    assert overall == pytest.approx(math.sqrt(z.var(dim=0).sum() / fitted.var(dim=0).sum()))
    assert dispersion(fitted + 7, fitted)[0] == pytest.approx(1)
    assert dispersion(fitted[:1].expand(5, 6), fitted)[0] == pytest.approx(0)
    overall, each = dispersion(z[:1], fitted)
    assert math.isnan(overall) and each.isnan().all()


@pytest.mark.parametrize(("m", "n", "size"), [(60, 40, 5), (4, 9, 6)])
def test_frechet_distance_against_a_matrix_square_root(m: int, n: int, size: int) -> None:
    a = normal(m, size).double() @ normal(size, size, seed=1).double() + 2
    b = normal(n, size, seed=2).double() * torch.arange(1, size + 1)
    left, right = a.T.cov().numpy(), b.T.cov().numpy()
    root = linalg.sqrtm(linalg.sqrtm(left) @ right @ linalg.sqrtm(left)).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + left.trace() + right.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_in_closed_form() -> None:
    a = normal(30, 4).double()
    shift = torch.tensor([1.0, 2.0, 0.0, -2.0])
    spread = a.var(dim=0).sum().item()  # 2 (x - mean) has the covariance 4 C, so that the distance grows by tr C
    assert frechet_distance(a + shift, a) == pytest.approx(9)
    assert frechet_distance(a.mean(0) + 2 * (a - a.mean(0)), a) == pytest.approx(spread)
    assert frechet_distance(normal(20_000, 4), normal(20_000, 4, seed=1)) < 0.01
    assert math.isnan(frechet_distance(a[:1], a)) and math.isnan(frechet_distance(a, a[:1]))


@pytest.mark.parametrize("block", [1, 1 << 26])
@pytest.mark.parametrize(("classes", "dtype"), [(1, torch.uint8), (3, torch.uint8), (900, torch.int16)])
def test_disagreement_against_a_loop(
    classes: int, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "BLOCK_BYTES", block)
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(classes, (37,), generator=g)
    a, b = (
        torch.where(torch.rand(n, 37, generator=g) < 0.7, truth, torch.randint(classes, (n, 37), generator=g)).to(dtype)
        for n in (6, 4)
    )
    found = disagreement(a, b)
    assert found.dtype == torch.float64 and found.shape == (6, 4)
    for i, j in itertools.product(range(6), range(4)):
        assert found[i, j].item() == pytest.approx((a[i] != b[j]).double().mean().item(), abs=1e-15)
    assert disagreement(a, a).diagonal().tolist() == [0] * 6


def test_disagreement_at_the_edges() -> None:
    a = torch.zeros(2, 5, dtype=torch.uint8)
    assert disagreement(a, a + 255).tolist() == [[1, 1], [1, 1]]
    assert disagreement(a[:, :0], a[:, :0]).isnan().all()
    assert disagreement(a[:0], a).shape == (0, 2)


def test_novel_and_performant_counts_both() -> None:
    accuracy, new = torch.tensor([0.9, 0.9, 0.8, 0.95]), torch.tensor([0.5, 1.0, 2.0, math.nan])
    assert novel_and_performant(accuracy, new, bar=0.9, tau=0.5) == 0.5
    assert novel_and_performant(accuracy, new, bar=0.9, tau=0.75) == 0.25
    assert novel_and_performant(accuracy, new, bar=0.0, tau=0.0) == 0.75
    assert math.isnan(novel_and_performant(accuracy[:0], new[:0], bar=0, tau=0))
