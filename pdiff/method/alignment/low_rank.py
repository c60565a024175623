"""The canonical form of a low-rank update B A: the two factors are known up to an invertible matrix between them."""

from __future__ import annotations

import torch
from torch import Tensor


def canonical_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced factors of a low-rank update, unique where its non-zero singular values differ.

    (A, B) and (R^-1 A, B R) are the same update for every invertible R (r, r). With the QR decompositions B = Q_b T_b
    and A^T = Q_a T_a, and the singular value decomposition T_b T_a^T = U S V^T, the update B A is (Q_b U) S (Q_a V)^T.
    Its factors with equal norms, in the order of the singular values, are B' = Q_b U S^1/2 and A' = S^1/2 (Q_a V)^T.
    Of every column of B', the number with the largest magnitude is positive. Nothing as large as B A is computed.

    Args:
        a: A, floating and finite (r, in, ...).
        b: B, floating and finite (out, r, ...).

    Returns:
        A' and B', of the shapes and types of A and B.
    """
    left, right = b.double().movedim(1, -1), a.double()  # (out, ..., r), (r, in, ...)
    rows = left.shape[:-1]
    q_b, t_b = torch.linalg.qr(left.reshape(-1, left.shape[-1]))
    q_a, t_a = torch.linalg.qr(right.reshape(len(right), -1).T)
    u, s, vt = torch.linalg.svd(t_b @ t_a.T, full_matrices=False)
    new_b, new_a = q_b @ u, vt @ q_a.T
    largest = new_b.abs().argmax(dim=0, keepdim=True)
    scale = s.sqrt() * new_b.gather(0, largest)[0].sign()
    missing = len(right) - len(s)  # r is larger than a side of B A: the rest of the factors is zero
    new_b = torch.nn.functional.pad(new_b * scale, (0, missing))
    new_a = torch.nn.functional.pad(new_a * scale[:, None], (0, 0, 0, missing))
    return new_a.reshape(a.shape).to(a.dtype), new_b.reshape(*rows, -1).movedim(-1, 1).contiguous().to(b.dtype)
