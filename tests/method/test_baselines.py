"""Baselines against closed forms, loops and scipy; one contract over all of them."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

from pdiff.method import null_arms, vectors
from pdiff.method.autoencoders.pca import PCA
from pdiff.method.baselines import BASELINES, Fitted, available, noise
from pdiff.method.collection import Collection
from pdiff.method.novelty import nearest_two, squared_distances
from pdiff.method.standardize import Standardizer

ALL = [*BASELINES.values(), noise(0.05)]


def fitted_on(x: Tensor, **parts) -> Fitted:
    """Vectors (N, D) of one tensor, as they are: mean 0 and deviation 1."""
    standardizer = Standardizer.fit(Collection({"weight": torch.randn(2, x.shape[1])}))
    (slot,) = standardizer.slots
    return Fitted(x, Standardizer([replace(slot, mean=0.0, std=1.0)], {}, ["weight"]), **parts)


def random(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, size: int) -> Tensor:
    """Vectors with a mean, unequal variances and correlations."""
    return 2 + random(n, size) @ random(size, size, 1) / size**0.5 * torch.linspace(0.3, 2, size)


def by_unit(x: Tensor):
    """Recombines units of two numbers each."""

    def recombine(parents: Tensor, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        choice = torch.randint(parents.shape[1], (len(parents), x.shape[1] // 2), generator=g)
        rows = parents.gather(1, choice).repeat_interleave(2, dim=1)
        return x.gather(0, rows)

    return recombine


def coefficients(networks: Tensor, x: Tensor) -> Tensor:
    """Weights (M, N) of the originals in each network, by least squares."""
    return torch.linalg.lstsq(x.T.double(), networks.T.double()).solution.T


def distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@pytest.fixture
def layout() -> tuple[Collection, Fitted]:
    """Forty checkpoints with every kind of tensor, and everything that a baseline may need."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "weight": 0.3 + 0.05 * torch.randn(40, 4, 3, generator=g),
        "scale": 2 + torch.randn(40, 1, generator=g),
        "norm.running_var": 0.2 + torch.rand(40, 5, generator=g),
        "norm.num_batches_tracked": torch.arange(40) + 10,
        "half": torch.randn(40, 7, generator=g).half(),
    }
    collection = Collection(tensors)
    standardizer = Standardizer.fit(collection)
    x = standardizer.encode(collection)
    return collection, Fitted(x, standardizer, lambda rows: 0.9 * rows, 0.3, by_unit(x))


@pytest.mark.parametrize("baseline", ALL, ids=lambda baseline: baseline.name)
@pytest.mark.parametrize("count", [1, 5, 50])
def test_contract(baseline, count: int, layout) -> None:
    collection, fitted = layout
    before = fitted.vectors.clone()
    one, again, other = (baseline.make(fitted, count, seed) for seed in (1, 1, 2))
    expected = {"average": 1, "reconstruction": min(count, 40)}.get(baseline.name, count)
    assert one.shape == (expected, fitted.standardizer.size) and one.dtype == torch.float32
    assert one.isfinite().all() and torch.equal(one, again) and torch.equal(fitted.vectors, before)
    assert baseline.name == "average" or count == 1 or not torch.equal(one, other)
    assert len(one.unique(dim=0)) == len(one), "networks are copies of each other"
    fewer = baseline.make(fitted, max(1, count // 2), 1)
    assert torch.allclose(one[: len(fewer)], fewer, atol=1e-5), "a network depends on how many there are"
    networks = fitted.standardizer.decode(one)
    assert list(networks.tensors) == list(collection.tensors)
    for name, tensor in networks.tensors.items():
        assert tensor.shape[1:] == collection.tensors[name].shape[1:] and tensor.dtype == collection.tensors[name].dtype
    assert set(networks.tensors["norm.num_batches_tracked"].tolist()) == {10}
    assert baseline.description.endswith(".")


def test_baselines_have_streams_of_their_own() -> None:
    fitted = fitted_on(torch.zeros(1, 50), distance=0.05)  # the same numbers, but for the stream
    assert not torch.equal(BASELINES["noise_matched"].make(fitted, 9, 0), noise(0.05).make(fitted, 9, 0))


def test_names_are_keys() -> None:
    assert all(name == baseline.name for name, baseline in BASELINES.items())
    assert BASELINES["swag"].options == {"rank": 20}  # K of the paper
    assert noise(0.001).name == "noise_0.001" and noise(0.15).name == "noise_0.15"


@pytest.mark.parametrize("baseline", ALL, ids=lambda baseline: baseline.name)
def test_needs(baseline, layout) -> None:
    _, fitted = layout
    enough = replace(fitted, vectors=fitted.vectors[: baseline.originals])
    if baseline.parts != ("recombine",):
        assert baseline.make(enough, 3, 0).isfinite().all()
    assert not baseline.unmet(baseline.originals, baseline.parts)
    if baseline.originals > 1:
        fewer = replace(fitted, vectors=fitted.vectors[: baseline.originals - 1])
        reason = (
            f"baseline {baseline.name} needs {baseline.originals} originals, but there are {baseline.originals - 1}"
        )
        assert baseline.unmet(baseline.originals - 1, baseline.parts) == reason
        with pytest.raises(ValueError, match=reason):
            baseline.make(fewer, 3, 0)
    if baseline.parts:
        with pytest.raises(ValueError, match=f"baseline {baseline.name} needs "):
            baseline.make(Fitted(fitted.vectors, fitted.standardizer), 3, 0)
    with pytest.raises(ValueError, match="count >= 1 must hold, but got 0"):
        baseline.make(fitted, 0, 0)


def test_what_is_available() -> None:
    parts = {"reconstruct", "distance", "recombine"}
    assert available(32, parts) == list(BASELINES)
    assert set(BASELINES) - set(available(31, parts)) == {"recombined_32"}
    assert set(available(31, parts)) - set(available(31)) == {
        *("recombined_2", "recombined_4", "reconstruction", "noise_matched"),
    }
    assert available(1) == ["average"]
    assert Fitted(torch.zeros(1, 1), None, distance=0.0).parts == {"distance"}
    assert Fitted(torch.zeros(1, 1), None, lambda x: x, None, lambda p, s: p).parts == {"reconstruct", "recombine"}


@pytest.mark.parametrize("distance", [math.nan, math.inf, -0.1])
def test_a_distance_is_finite(distance: float) -> None:
    with pytest.raises(ValueError, match="0 <= distance < inf must hold"):
        Fitted(torch.zeros(1, 1), None, distance=distance)


@pytest.mark.slow
def test_the_registry_needs_no_torch() -> None:
    code = "import sys, pdiff.method.baselines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# averages


@pytest.mark.parametrize(("name", "size"), [("average", 30), ("average_4", 4), ("average_16", 16), ("midpoint", 2)])
def test_averages_are_means_of_so_many_originals(name: str, size: int) -> None:
    x = random(30, 200)
    networks = BASELINES[name].make(fitted_on(x), 25, 0)
    weights = coefficients(networks, x)
    assert torch.allclose(weights @ x.double(), networks.double(), atol=1e-5), "outside of the span"
    assert torch.allclose(weights.sort(dim=1, descending=True).values[:, :size], torch.tensor(1 / size).double())
    assert (weights.abs() > 1e-4).sum(dim=1).tolist() == [size] * len(networks)


def test_subsets_are_uniform_and_come_once() -> None:
    weights = BASELINES["average_4"].make(fitted_on(torch.eye(6)), 100, 0)
    assert len(weights) == math.comb(6, 4) and len(weights.unique(dim=0)) == 15
    assert len(BASELINES["average_16"].make(fitted_on(torch.eye(16)), 100, 0)) == 1
    often = BASELINES["average_16"].make(fitted_on(torch.eye(40)), 2000, 0).gt(0).double().mean(dim=0)
    assert (often - 0.4).abs().max() < 5 * (0.4 * 0.6 / 2000) ** 0.5


def test_convex_weights_are_of_a_flat_dirichlet() -> None:
    weights = BASELINES["convex"].make(fitted_on(torch.eye(5)), 4000, 0).double()
    assert (weights >= -1e-6).all() and torch.allclose(weights.sum(dim=1), torch.ones(4000).double(), atol=1e-6)
    covariance = (torch.eye(5) / 5 - 1 / 25) / 6  # of Dirichlet(1, .., 1): (diag(p) - p p^T) / (n + 1)
    assert torch.allclose(weights.mean(dim=0), torch.full((5,), 0.2).double(), atol=0.013)
    assert torch.allclose(weights.T.cov(), covariance.double(), atol=0.004)


def test_average_against_a_loop(mixed: Collection) -> None:
    found = BASELINES["average"](mixed)
    assert len(found) == 1 and list(found.tensors) == list(mixed.tensors)
    for name, tensor in mixed.tensors.items():
        (mean,) = found.tensors[name]
        assert mean.dtype == tensor.dtype and mean.shape == tensor.shape[1:]
        if name in ("scale", "counts") or not tensor.is_floating_point():
            assert torch.equal(mean, tensor[0])
            continue
        columns = tensor.double().flatten(1).T.tolist()
        expected = torch.tensor([fmean(column) for column in columns], dtype=torch.float64)
        assert torch.allclose(mean.double().flatten(), expected, rtol=1e-3 if name == "half" else 1e-5, atol=1e-6)


def test_average_of_many_half_precision_networks_does_not_overflow() -> None:
    tensors = {"a": torch.full((300, 2), 6e4).half(), "b": torch.full((300, 2), 0.1)}
    found = BASELINES["average"](Collection(tensors)).tensors
    assert torch.equal(found["a"], tensors["a"][:1]) and torch.allclose(found["b"], tensors["b"][:1])


def test_tiny_differences_keep_their_digits() -> None:
    x = (3 + 1e-5 * random(30, 50)).float()
    networks = BASELINES["midpoint"].make(fitted_on(x), 20, 0).double()
    pairs = torch.stack([(x[i].double() + x[j].double()) / 2 for i, j in itertools.combinations(range(30), 2)])
    assert distances(networks, pairs).amin(dim=1).max() < 3e-7 * 3 * 50**0.5


@pytest.mark.parametrize("columns", [1, 7, 1000])
def test_combinations_are_summed_over_blocks(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 8 * 6 * columns)
    x, weights = 5 + random(6, 50), random(4, 6, 1)
    expected = x.double().mean(0) + weights.double() @ (x.double() - x.double().mean(0))
    assert torch.allclose(null_arms.combination(weights, x).double(), expected, atol=1e-4)


# Gaussians


def of_moments(samples: Tensor, mean: Tensor, covariance: Tensor, *, sigmas: float = 5) -> None:
    """Samples (M, D) of a Gaussian have its mean and covariance, to so many standard errors."""
    samples, mean, covariance = samples.double(), mean.double(), covariance.double()
    variances, m = covariance.diagonal(), len(samples)
    assert ((samples.mean(0) - mean).abs() <= sigmas * (variances / m).sqrt() + 1e-6).all()
    error = ((variances[:, None] * variances + covariance**2) / m).sqrt()
    assert ((samples.T.cov() - covariance).abs() <= sigmas * error + 1e-6).all()


def test_gaussian_has_mean_and_sample_covariance() -> None:
    x = correlated(12, 6)
    samples = BASELINES["gaussian"].make(fitted_on(x), 4000, 0)
    of_moments(samples, x.mean(0), x.T.cov())


def test_gaussian_of_few_originals_stays_in_their_span() -> None:
    x = random(5, 60)
    networks = BASELINES["gaussian"].make(fitted_on(x), 20, 0)
    weights = coefficients(networks, x)
    assert torch.allclose(weights @ x.double(), networks.double(), atol=1e-4)
    assert torch.allclose(weights.sum(dim=1), torch.ones(20).double(), atol=1e-5)


def test_gaussian_diagonal_has_variances_alone() -> None:
    x = correlated(12, 6)
    samples = BASELINES["gaussian_diagonal"].make(fitted_on(x), 4000, 0)
    of_moments(samples, x.mean(0), x.var(0).diag())


@pytest.mark.parametrize(("n", "rank"), [(12, 20), (30, 20), (30, 2)])
def test_swag_against_its_equation(n: int, rank: int) -> None:
    x = correlated(n, 6).double()
    first, second, deviations = torch.zeros(6).double(), torch.zeros(6).double(), []
    for i, theta in enumerate(x):  # algorithm 1 of the paper
        first, second = (i * first + theta) / (i + 1), (i * second + theta**2) / (i + 1)
        deviations = [*deviations, theta - first][-rank:]
    d = torch.stack(deviations, dim=1)
    covariance = (second - first**2).diag() / 2 + d @ d.T / (2 * (d.shape[1] - 1))
    samples = null_arms.swag(fitted_on(x.float()), 4000, 0, rank=rank)
    of_moments(samples, x.mean(0), covariance)


def test_mixed_keeps_mean_and_covariance() -> None:
    x = correlated(12, 6)
    samples = BASELINES["mixed"].make(fitted_on(x), 4800, 0)
    population = x.T.cov(correction=0)  # of originals taken equally often; a Gaussian with correction 1
    of_moments(samples, x.mean(0), 0.75 * population + 0.25 * x.T.cov())
    assert samples.var(0).sum().item() == pytest.approx(x.var(0).sum().item() * (0.75 * 11 / 12 + 0.25), rel=0.05)
    origins = distances(null_arms.mixed(fitted_on(x), 24, 0, a=0.0), x).argmin(dim=1)
    assert sorted(origins.tolist()) == sorted([*range(12)] * 2)


def test_mixed_at_its_ends() -> None:
    x = correlated(12, 6)
    unmixed = null_arms.mixed(fitted_on(x), 12, 0, a=0.0)
    assert distances(unmixed, x).amin(dim=0).max() < 1e-4
    of_moments(null_arms.mixed(fitted_on(x), 4000, 0, a=1.0), x.mean(0), x.T.cov())


# kernel densities


def test_kde_without_bandwidth_is_the_originals() -> None:
    x = random(8, 40)
    samples = null_arms.kde(fitted_on(x), 400, 0, variance=1.0, bandwidth=0.0)
    assert distances(samples, x).amin(dim=1).max() < 1e-4
    hits = distances(samples, x).argmin(dim=1).bincount(minlength=8)
    assert ((hits - 50).abs() < 5 * (400 * 7 / 64) ** 0.5).all()


def test_kde_has_the_kernels_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = correlated(30, 4)
    scott = stats.gaussian_kde(x.T.double().numpy(), "scott").factor
    default, same = (null_arms.kde(fitted_on(x), 50, 0, variance=1.0, bandwidth=h) for h in (None, scott))
    assert torch.allclose(default, same, atol=1e-5)
    samples = null_arms.kde(fitted_on(x), 4000, 0, variance=1.0, bandwidth=1.0)
    of_moments(samples, x.mean(0), x.T.cov(correction=0) + x.T.cov())


def test_kde_noise_is_independent_in_every_dimension() -> None:
    x = torch.eye(4) * 1000
    samples = null_arms.kde(fitted_on(x), 3000, 0, variance=1.0)
    centers = x[distances(samples, x).argmin(dim=1)]
    z = PCA.fit(x, variance=1.0).encode(samples - centers + x.mean(0))  # h s z; s is equal in all
    correlations = z.T.corrcoef() - torch.eye(z.shape[1])
    assert correlations.abs().max() < 0.15


# noise, reconstruction, recombination


@pytest.mark.parametrize("scale", [0.0, 0.001, 0.05, 0.15])
def test_noise_has_its_scale_in_standardised_units(scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "small": 1e-3 * torch.randn(20, 30, 10, generator=g),
        "large": 50 + 9 * torch.randn(20, 400, generator=g),
    }
    tensors["bn.running_var"], tensors["n"] = 0.5 + torch.rand(20, 200, generator=g), torch.arange(20)
    collection = Collection(tensors)
    standardizer = Standardizer.fit(collection)
    originals = standardizer.encode(collection)
    of_arm = noise(scale).make(Fitted(originals, standardizer), 20, 1)
    origins = distances(of_arm, originals).argmin(dim=1)
    assert sorted(origins.tolist()) == list(range(20))
    added = of_arm - originals[origins]
    for part in added.split([300, 400, 200], dim=1):
        assert part.std().item() == pytest.approx(scale, rel=0.05, abs=1e-5)
        assert part.mean().item() == pytest.approx(0, abs=5 * scale / part.numel() ** 0.5 + 1e-5)
    assert scale == 0 or torch.pdist(added).min() > scale  # every network gets noise of its own


@pytest.mark.parametrize("distance", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_matched_noise_has_the_median_nearest_distance(distance: float, spread: float) -> None:
    x = spread * random(30, 4000)
    networks = BASELINES["noise_matched"].make(fitted_on(x, distance=distance), 60, 0)
    distances = (squared_distances(networks, x) / x.shape[1]).sqrt()
    assert nearest_two(distances)[0].median().item() == pytest.approx(distance, rel=0.03)


def test_reconstructions_are_of_different_originals() -> None:
    x, widths = random(100, 20), []

    def reconstruct(rows: Tensor) -> Tensor:
        widths.append(len(rows))
        return 0.5 * rows

    networks = BASELINES["reconstruction"].make(fitted_on(x, reconstruct=reconstruct), 300, 0)
    assert sorted((2 * networks).tolist()) == sorted(x.tolist()) and max(widths) <= 64


@pytest.mark.parametrize("size", [2, 4, 32])
def test_recombined_units_are_of_so_many_parents(size: int) -> None:
    x = random(40, 2000)
    networks = BASELINES[f"recombined_{size}"].make(fitted_on(x, recombine=by_unit(x)), 10, 0)
    for network in networks:
        equal = network == x  # (N, D)
        assert equal.any(dim=0).all() and equal.any(dim=1).sum() == size
