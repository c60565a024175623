"""Whether generated networks are new: distances to the fitted ones, copies, spread, and what lies outside their span.

A vector is a standardised checkpoint, as everywhere. Distances and sums are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pdiff.method.vectors import Matrix, blocks

NAN = float("nan")


class Products(NamedTuple):
    """Inner products of two sets of vectors about the mean of the second, float64.

    Attributes:
        inner: (A, B).
        a: squared norms of the first set, (A,).
        b: squared norms of the second set, (B,).
        center: squared norm of the mean, a scalar.
    """

    inner: Tensor
    a: Tensor
    b: Tensor
    center: Tensor

    def squared_distances(self) -> Tensor:
        """Squared distances, float64 (A, B); see the function of that name."""
        return (self.a[:, None] + self.b - 2 * self.inner).clamp(min=0)


def centered_products(a: Matrix, b: Matrix) -> Products:
    """Inner products of vectors about the mean of b, summed over blocks of columns.

    The mean is taken off in float64, so that sums keep their digits where all vectors lie far from the origin. Memory:
    the results and a block of columns, for any D.

    Args:
        a: vectors (A, D), of any device and floating type.
        b: vectors (B, D); its device holds the results.
    """
    like = {"dtype": torch.float64, "device": b.device}
    sums = Products(*(torch.zeros(shape, **like) for shape in ((len(a), len(b)), len(a), len(b), ())))
    for part in blocks(b.shape[1], bytes_each=8 * (len(a) + len(b))):
        y = b[:, part].double()
        center = y.mean(dim=0)
        y = y - center
        x = y if a is b else a[:, part].to(y) - center
        sums.inner.addmm_(x, y.T)
        sums.a.add_(torch.einsum("nd,nd->n", x, x))
        sums.b.add_(torch.einsum("nd,nd->n", y, y))
        sums.center.add_(center @ center)
        del x, y  # before the next block needs memory
    return sums


def squared_distances(a: Matrix, b: Matrix) -> Tensor:
    """Squared Euclidean distances, ||x||^2 + ||y||^2 - 2 x.y, x and y taken about the mean of b.

    Distances far below the spread of b are rounding: about 1e-8 of it.

    Args:
        a: vectors (A, D).
        b: vectors (B, D).

    Returns:
        Squared distances, float64 (A, B), never below 0.
    """
    return centered_products(a, b).squared_distances()


def nearest_two(distances: Tensor, *, same: bool = False) -> tuple[Tensor, Tensor]:
    """Distances of each vector to the nearest and the second nearest of another set.

    Args:
        distances: (A, B), squared or not.
        same: both sets are one; a vector is not compared with itself.

    Returns:
        The smallest and the second smallest of each row, each (A,); NaN where there are too few.
    """
    if same:
        distances = distances.clone().fill_diagonal_(float("inf"))
    two = functional.pad(distances, (0, 2), value=float("inf")).topk(2, dim=1, largest=False).values
    first, second = torch.where(two.isinf(), NAN, two).unbind(dim=1)
    return first, second


def data_copying(generated: Tensor, heldout: Tensor) -> float:
    """Z_U: whether generated networks lie nearer to the fitted ones than held-out networks do.

    Z = (U - nm/2) / sqrt(nm/12 (n + m + 1 - sum(t^3 - t) / ((n + m)(n + m - 1)))), where U counts the pairs in which
    the generated network is the farther one, ties as one half, and t are the sizes of groups of ties (Meehan,
    Chaudhuri, Dasgupta 2020, arXiv 2004.05675, section 3; Mann & Whitney 1947, corrected for ties). Standard normal
    where both follow one distribution; far below 0: copies; far above 0: the generated networks are too far away.

    Args:
        generated: distances of generated networks to their nearest fitted one, (n,).
        heldout: the same of held-out networks, (m,).

    Returns:
        Z_U; NaN where either is empty or holds a NaN; 0 where all distances are equal.
    """
    n, m = len(generated), len(heldout)
    pooled = torch.cat([generated, heldout]).double()
    if n == 0 or m == 0 or pooled.isnan().any():
        return NAN
    _, where, ties = pooled.unique(return_inverse=True, return_counts=True)
    ties = ties.double()
    midranks = ties.cumsum(0) - (ties - 1) / 2
    u = (midranks[where[:n]].sum() - n * (n + 1) / 2).item()
    corrected = n + m + 1 - (ties**3 - ties).sum().item() / ((n + m) * (n + m - 1))
    return (u - n * m / 2) / (n * m / 12 * corrected) ** 0.5 if corrected > 1e-9 else 0.0


def precision_recall_density_coverage(
    real_real: Tensor, fake_real: Tensor, fake_fake: Tensor, *, k: int = 5
) -> dict[str, float]:
    """Fidelity and diversity by balls that reach to the k-th nearest neighbour.

    Precision: the share of fakes inside a ball of a real vector. Recall: of real vectors inside a ball of a fake
    (Kynkäänniemi et al. 2019, arXiv 1904.06991). Density: balls of real vectors around a fake, over k. Coverage: the
    share of balls of real vectors that hold a fake (Naeem et al. 2020, arXiv 2002.09797, eq. 2 - 5). Balls are open.

    Args:
        real_real: distances among the N real vectors, (N, N), all squared or none.
        fake_real: from fakes to real vectors, (M, N).
        fake_fake: among the M fakes, (M, M).
        k: of the neighbour, not counting the vector itself.

    Returns:
        precision, recall, density and coverage; NaN where balls lack a k-th neighbour, or where a side is empty.
    """
    radii_real, radii_fake = _radii(real_real, k), _radii(fake_fake, k)
    inside_real, inside_fake = fake_real < radii_real, fake_real < radii_fake[:, None]
    found = {
        "precision": (inside_real.any(dim=1), radii_real),
        "recall": (inside_fake.any(dim=0), radii_fake),
        "density": (inside_real.sum(dim=1) / k, radii_real),
        "coverage": (inside_real.any(dim=0), radii_real),
    }
    empty = fake_real.numel() == 0
    return {
        name: NAN if empty or radii.isnan().any() else counts.double().mean().item()
        for name, (counts, radii) in found.items()
    }


def _radii(distances: Tensor, k: int) -> Tensor:
    """Distance of each vector to its k-th nearest neighbour, (n,), of a square matrix; NaN where n <= k."""
    if len(distances) <= k:
        return distances.new_full((len(distances),), NAN)
    return distances.clone().fill_diagonal_(float("inf")).kthvalue(k, dim=1).values


class Span:
    """Principal axes of the fitted vectors, and coordinates on them, without an axis ever being stored.

    The axes come from the Gram matrix of the centered vectors X: an eigenvector v with value s belongs to the axis
    X^T v / sqrt(s) ("method of snapshots", Sirovich 1987), so that a coordinate of y is y.X^T v / sqrt(s). Memory:
    O(N^2) and a block of columns; a vector is streamed together with the fitted ones, which stay where they are.

    Attributes:
        x: the fitted vectors (N, D).
        values: their variances along the axes, descending, float64 (L,); L is their rank, at most N - 1.
        fitted: their coordinates, float64 (N, L).
    """

    def __init__(self, x: Matrix, eigenvalues: Tensor, eigenvectors: Tensor) -> None:
        self.x = x
        self.values = eigenvalues / max(1, len(x) - 1)
        self.fitted = eigenvectors * eigenvalues.sqrt()
        self._weights = eigenvectors / eigenvalues.sqrt()

    @classmethod
    def fit(cls, x: Matrix, products: Products | None = None) -> Span:
        """Principal axes of vectors (N, D), of any device; `products` are those of x with itself, where they are known.

        An axis counts if its value exceeds what rounding alone may yield: the largest value times N eps of float64,
        and eps^2 of the numbers' type times the largest value of noise of their size, (sqrt(N) + sqrt(D))^2 times
        their mean square (Davidson & Szarek 2001, theorem II.13).
        """
        gram, norms, _, center = products or centered_products(x, x)
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0), vectors.flip(1)
        n, d = x.shape
        noise = (n**0.5 + d**0.5) ** 2 * (norms.mean() + center) / d
        rounding = (values[0] * n * torch.finfo(torch.float64).eps).maximum(noise * torch.finfo(x.dtype).eps ** 2)
        rank = int((values > rounding).sum())
        return cls(x, values[:rank], vectors[:, :rank])

    def project(self, y: Matrix, products: Products | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates of vectors on the axes, and the share of each that lies outside; one pass over both sets.

        Args:
            y: vectors (M, D).
            products: of y with the fitted vectors, where they are known.

        Returns:
            Coordinates float64 (M, L); and float64 (M,), the share of the squared distance from the mean of the fitted
            vectors that lies outside their affine span: 0 for averages and mixes of them, 1 for what is orthogonal.
            What rounding explains counts as 0: N eps^2 of the numbers' type, times their squares.
        """
        inner, norms, _, center = products or centered_products(y, self.x)
        coordinates = inner @ self._weights
        outside = norms - coordinates.square().sum(dim=1)
        rounding = len(self.x) * torch.finfo(y.dtype).eps ** 2 * (norms + center)
        share = torch.where(outside <= rounding, 0.0, outside / norms)
        return coordinates, share

    def weights(self, coordinates: Tensor) -> Tensor:
        """The weights (M, N) of the fitted vectors about their mean that make points of coordinates (M, L).

        Axes that are left out at the end count as 0.
        """
        return coordinates @ self._weights[:, : coordinates.shape[1]].T.to(coordinates)

    def coordinates(self, y: Matrix) -> Tensor:
        """Principal coordinates of vectors (M, D) about the mean of the fitted ones, float64 (M, L)."""
        return self.project(y)[0]

    def outside(self, y: Matrix) -> Tensor:
        """Share of vectors (M, D) outside the affine span of the fitted ones, float64 (M,); see `project`."""
        return self.project(y)[1]


def dispersion(z: Tensor, z_fitted: Tensor) -> tuple[float, Tensor]:
    """Spread of generated latents over that of the fitted ones: the ratio of their standard deviations.

    sqrt(sum_i ||z_i - mean||^2 / (M - 1)) over the same of the fitted; and so for each component alone.

    Args:
        z: latents (M, L).
        z_fitted: latents of the fitted networks, (N, L).

    Returns:
        The ratio over all components, and of each component, float64 (L,). 1: as diverse as the fitted; 0: all equal.
        NaN for a single network.
    """
    ours, theirs = (
        (latents - latents.mean(dim=0)).square().sum(dim=0) / (len(latents) - 1)
        for latents in (z.double(), z_fitted.double())
    )
    return (ours.sum() / theirs.sum()).sqrt().item(), (ours / theirs).sqrt()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets (Dowson & Landau 1982, eq. 4).

    ||mean_a - mean_b||^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2). With factors R^T R = C, the last trace is the
    sum of the singular values of R_a R_b^T, so that no covariance and no square root of a matrix is computed.

    Args:
        a: latents (M, L).
        b: latents (N, L).

    Returns:
        The squared distance, at least 0; NaN where a set has fewer than two.
    """
    if min(len(a), len(b)) < 2:
        return NAN
    a, b = a.double(), b.double()
    roots = [torch.linalg.qr(z - z.mean(dim=0), mode="r").R / (len(z) - 1) ** 0.5 for z in (a, b)]
    traces = sum(root.square().sum() for root in roots)
    common = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum() + traces - 2 * common).clamp(min=0).item()


def disagreement(a: Tensor, b: Tensor) -> Tensor:
    """Share of images on which two networks predict different classes.

    Counts agreement as products of one-hot rows, a column for each (image, class) that occurs on both sides: exact,
    and far fewer columns than images times classes.

    Args:
        a: predicted classes (A, images), integers from 0.
        b: predicted classes (B, images).

    Returns:
        Shares in [0, 1], float64 (A, B); NaN without images.
    """
    classes = 1 + max((int(p.max()) for p in (a, b) if p.numel()), default=0)
    agreeing = torch.zeros(len(a), len(b), dtype=torch.float64, device=b.device)
    columns = min(classes, len(a), len(b))  # of an image, at most
    for part in blocks(a.shape[1], bytes_each=(4 * columns + 16) * (len(a) + len(b)) + 24 * classes):
        first = torch.arange(part.stop - part.start, device=b.device) * classes
        pair = [p[:, part].to(b.device, torch.long) + first for p in (a, b)]  # an image's class, numbered
        seen = [keys.flatten().bincount(minlength=len(first) * classes) > 0 for keys in pair]
        column = torch.where(seen[0] & seen[1], (seen[0] & seen[1]).cumsum(0), 0)  # 0: not on both sides
        x, y = (
            torch.zeros(len(keys), int(column.max()) + 1, device=b.device).scatter_(1, column[keys], 1.0)[:, 1:]
            for keys in pair
        )
        agreeing += x @ y.T
    return 1 - agreeing / a.shape[1]


def novel_and_performant(accuracy: Tensor, novelty: Tensor, *, bar: float, tau: float) -> float:
    """Share of networks that are both good and new (field, section 4): accuracy >= bar and novelty >= tau.

    Args:
        accuracy: (n,).
        novelty: distance to the nearest fitted network over the median distance that held-out ones have, (n,).
        bar: accuracy that counts as good; to be fixed before looking.
        tau: novelty that counts as new.

    Returns:
        The share in [0, 1]; NaN without networks. A NaN is neither good nor new.
    """
    return ((accuracy >= bar) & (novelty >= tau)).double().mean().item()
