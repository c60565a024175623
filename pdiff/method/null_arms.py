"""How baselines are computed: functions (fitted, count, seed) -> standardised vectors (M, D); see `baselines`.

Symbols: x (N, D) the vectors of the originals, m their mean, M the networks that are made, z standard normal numbers.
Each network has its own random generator, so that network k does not depend on `count`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pdiff.files import scratch
from pdiff.method.autoencoders.pca import ROWS
from pdiff.method.baselines import Fitted
from pdiff.method.novelty import Span
from pdiff.method.vectors import Matrix, column_blocks, deviations, joined, over_columns
from pdiff.seeds import stream


def average(fitted: Fitted, count: int, seed: int) -> Tensor:
    """The mean of all originals, (1, D) (method, section 5)."""
    n = len(fitted.vectors)
    return mixture(torch.full((1, n), 1 / n), fitted)


def average_of(fitted: Fitted, count: int, seed: int, *, size: int) -> Tensor:
    """Means of random subsets of `size` originals, no subset twice, (M, D); M <= binomial(N, size)."""
    n = len(fitted.vectors)
    draws, chosen = subsets(n, size, seed), {}
    while len(chosen) < min(count, math.comb(n, size)):
        chosen.setdefault(tuple(sorted(next(draws).tolist())))
    return mixture(torch.zeros(len(chosen), n).scatter_(1, torch.tensor(list(chosen)), 1 / size), fitted)


def convex(fitted: Fitted, count: int, seed: int) -> Tensor:
    """Means of all originals with weights of a flat Dirichlet distribution, (count, D)."""
    return mixture(dirichlet(len(fitted.vectors), generators(count, seed)), fitted)


def gaussian_diagonal(fitted: Fitted, count: int, seed: int) -> Tensor:
    """m + s z with s the standard deviation of each parameter, (count, D)."""
    x = fitted.vectors
    mean, std = over_columns(lambda block: block.mean(0), x), deviations(x)
    return with_noise(mean.expand(count, -1), std, generators(count, seed))


def gaussian(fitted: Fitted, count: int, seed: int) -> Tensor:
    """m + z (x - m) / sqrt(N - 1) with z (count, N): the covariance is the sample covariance of x, (count, D)."""
    n = len(fitted.vectors)
    return combination(normal(n, generators(count, seed)) / (n - 1) ** 0.5, fitted.vectors)


def swag(fitted: Fitted, count: int, seed: int, *, rank: int) -> Tensor:
    """m + s z1 / sqrt(2) + z2 R / sqrt(2 (K - 1)), (count, D) (Maddox et al. 2019, arXiv 1902.02476, eq. 1).

    s (D,) is the standard deviation of each parameter over all originals. R (K, D) are the last K deviations x_i - m_i
    from the running mean m_i of x_1 .. x_i; K is `rank`, at most N. The order of x is that of training.
    """
    x, draws = fitted.vectors, generators(count, seed)
    n, rank = len(x), min(rank, len(x))
    from_running = torch.eye(n) - torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]  # R = from_running[-K:] @ x
    low_rank = combination(normal(rank, draws) @ from_running[-rank:] / (2 * (rank - 1)) ** 0.5, x)
    return with_noise(low_rank, deviations(x, correction=0) / 2**0.5, draws)


def kde(fitted: Fitted, count: int, seed: int, *, variance: float, bandwidth: float | None = None) -> Tensor:
    """Samples of Gaussian kernels around the originals, on principal components, (count, D).

    A sample is u_i + h s z, with u (N, L) the coordinates of x on the components that explain the share `variance` of
    its variance, i a random original, s (L,) the standard deviations of u, and h the `bandwidth`: by default Scott's
    rule N^(-1 / (L + 4)) (Scott 1992). Each of the L numbers of z is independent of the others.
    """
    x, draws = fitted.vectors, generators(count, seed)
    span = Span.fit(x)
    kept = int((span.values.cumsum(0) < variance * span.values.sum()).sum()) + 1
    u = span.fitted[:, :kept].float()
    if bandwidth is None:
        bandwidth = len(x) ** (-1 / (u.shape[1] + 4))
    centers = torch.cat([torch.randint(len(x), (1,), generator=draw) for draw in draws])
    return combination(span.weights(with_noise(u[centers], bandwidth * u.std(0), draws)), x)


def mixed(fitted: Fitted, count: int, seed: int, *, a: float) -> Tensor:
    """m + sqrt(1 - a^2) (x_i - m) + a z (x - m) / sqrt(N - 1), (count, D): mean and covariance are those of x."""
    n = len(fitted.vectors)
    weights = a * normal(n, generators(count, seed)) / (n - 1) ** 0.5
    weights[torch.arange(count), originals(n, count, seed)] += (1 - a**2) ** 0.5
    return combination(weights, fitted.vectors)


def recombined(fitted: Fitted, count: int, seed: int, *, size: int) -> Matrix:
    """Networks whose every unit is that of one of `size` random originals, (count, D)."""
    parents = torch.stack(list(itertools.islice(subsets(len(fitted.vectors), size, seed), count)))
    return fitted.recombine(parents, stream(seed, "units"))


@torch.no_grad()
def reconstruction(fitted: Fitted, count: int, seed: int) -> Matrix:
    """Originals through the autoencoder and back, each at most once, (M, D)."""
    n = len(fitted.vectors)
    rows = originals(n, min(count, n), seed).split(ROWS)
    return joined([fitted.reconstruct(fitted.vectors[some]) for some in rows])


def noise(fitted: Fitted, count: int, seed: int, *, scale: float) -> Tensor:
    """x_i + scale z, (count, D) (method, section 5); every original once before one comes again."""
    x = fitted.vectors
    return with_noise(x[originals(len(x), count, seed)], scale, generators(count, seed))


def noise_matched(fitted: Fitted, count: int, seed: int) -> Tensor:
    """Noise of scale s takes a network of many parameters to the distance s from its original: s = fitted.distance."""
    return noise(fitted, count, seed, scale=fitted.distance)


def mixture(weights: Tensor, fitted: Fitted) -> Tensor:
    """Means of the parameters of the originals, (M, D).

    The vectors are weights @ x, save for running variances v, of which they hold a logarithm; its argument is affine in
    v, so that it is the argument that is averaged.

    Args:
        weights: (M, N), not negative; every row has the sum 1.
        fitted: the originals.
    """
    vectors, start = combination(weights, fitted.vectors), 0
    for slot in fitted.standardizer.slots:
        part = slice(start, start := start + slot.size)
        if slot.variance:
            logarithm = (fitted.vectors[:, part] * slot.std + slot.mean).exp_()
            vectors[:, part] = (combination(weights, logarithm).log_() - slot.mean) / slot.std
    return vectors


def combination(weights: Tensor, x: Matrix) -> Tensor:
    """m + weights @ (x - m), in blocks of columns; where the sums of the rows of `weights` are 1 it is weights @ x.

    Differences between checkpoints may be tiny beside the weights; taken from the mean, they keep their digits.

    Args:
        weights: (M, N).
        x: vectors (N, D).

    Returns:
        Vectors (M, D).
    """
    result = scratch(len(weights), x.shape[1])
    for part in column_blocks(x):
        block = x[:, part]
        mean = block.mean(0)
        result[:, part] = mean + weights @ (block - mean)
    return result


def generators(count: int, seed: int) -> list[torch.Generator]:
    """A random generator for each network."""
    return [torch.Generator().manual_seed(stream(seed, k)) for k in range(count)]


def normal(size: int, draws: Sequence[torch.Generator]) -> Tensor:
    """Numbers of N(0, 1), a row for each generator, (len(draws), size)."""
    return torch.stack([torch.randn(size, generator=draw) for draw in draws])


def dirichlet(size: int, draws: Sequence[torch.Generator]) -> Tensor:
    """Weights of a flat Dirichlet distribution, a row for each generator, (len(draws), size): normalised exponentials.

    Source: Devroye 1986, Non-Uniform Random Variate Generation, chapter XI.4.
    """
    rows = torch.stack([torch.empty(size).exponential_(generator=draw) for draw in draws])
    return rows / rows.sum(dim=1, keepdim=True)


def with_noise(vectors: Matrix, scale: Tensor | float, draws: Sequence[torch.Generator]) -> Tensor:
    """vectors + scale z, (M, D), with z of one generator for each vector; scale is a number, or (D,)."""
    result = scratch(*vectors.shape)
    for row, draw, vector in zip(result, draws, vectors.split(1), strict=True):
        for part in column_blocks(vector):
            z = torch.randn(part.stop - part.start, generator=draw)
            row[part] = vector[:, part][0] + (scale[part] if isinstance(scale, Tensor) else scale) * z
    return result


def originals(n: int, count: int, seed: int) -> Tensor:
    """Indices of originals in random order, (count,); every one of them once before one comes again."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(stream(seed, "originals")))
    return order[torch.arange(count) % n]


def subsets(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Random subsets of `size` of n originals without end, (size,)."""
    for k in itertools.count():
        generator = torch.Generator().manual_seed(stream(seed, k))
        yield torch.randperm(n, generator=generator)[:size]
