"""How alike networks are in what they get wrong."""

import torch
from torch import Tensor


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
