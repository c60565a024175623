"""How alike networks are: in what they get wrong, and in weight space."""

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20  # of vectors in float64 at a time


def wrong_iou(a: Tensor, b: Tensor) -> Tensor:
    """Similarity of networks: IoU of the sets of images that they get wrong (method, section 5).

    One matrix product in float32, exact up to 2^24 images.

    Args:
        a: wrong predictions, bool (A, images).
        b: wrong predictions, bool (B, images).

    Returns:
        Similarities in [0, 1], (A, B); 1 where neither network is ever wrong.
    """
    a, b = a.float(), b.float()
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1) - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def mean_between(similarity: Tensor) -> float:
    """Mean over pairs of different networks of a square matrix (n, n); NaN for a single network."""
    n = len(similarity)
    return float((similarity.sum() - similarity.diagonal().sum()) / (n * (n - 1))) if n > 1 else float("nan")


def maxima_without_self(similarity: Tensor) -> Tensor:
    """Each network's largest similarity to another one, (n,), of a square matrix (n, n)."""
    return similarity.clone().fill_diagonal_(float("nan")).nan_to_num(-1).amax(dim=1).clamp(min=0)


def nearest_distance(a: Tensor, b: Tensor, *, same: bool = False) -> Tensor:
    """Distance of each vector to the nearest one of another set, per parameter.

    Args:
        a: vectors (A, D).
        b: vectors (B, D).
        same: a and b are the same set; a vector is not compared with itself.

    Returns:
        Root mean square difference to the nearest vector of b, in standard deviations of the weights, (A,).
    """
    columns = max(1, BLOCK_BYTES // (8 * (len(a) + len(b))))
    squares = a.new_zeros(len(a), len(b), dtype=torch.float64)
    for x, y in zip(a.split(columns, dim=1), b.split(columns, dim=1), strict=True):
        squares += torch.cdist(x.double(), y.double()).square()
    distance = squares.sqrt()
    if same:
        distance.fill_diagonal_(float("inf"))
    return (distance.amin(dim=1) / a.shape[1] ** 0.5).float()
