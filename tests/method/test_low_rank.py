"""The canonical form of low-rank updates: the same update, whichever factors it came in."""

import pytest
import torch

from pdiff.method.alignment.low_rank import canonical_pair


def pair(out: int, rank: int, width: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=g).double(), torch.randn(out, rank, generator=g).double()


@pytest.mark.parametrize("sizes", [(7, 3, 5), (5, 1, 9), (2, 4, 6), (6, 4, 3)])
def test_the_update_is_the_same_and_its_factors_are_those_of_the_svd(sizes):
    a, b = pair(*sizes)
    new_a, new_b = canonical_pair(a, b)
    assert new_a.shape == a.shape and new_b.shape == b.shape
    torch.testing.assert_close(new_b @ new_a, b @ a)
    singular = torch.linalg.svdvals(b @ a)[: sizes[1]]
    for squares in (new_a @ new_a.T, new_b.T @ new_b):
        expected = torch.zeros(sizes[1], dtype=a.dtype)
        expected[: len(singular)] = singular
        torch.testing.assert_close(squares, expected.diag(), atol=1e-10, rtol=1e-10)
    columns = new_b[:, : min(sizes)]
    assert (columns.gather(0, columns.abs().argmax(0, keepdim=True)) > 0).all()


def test_factors_that_differ_by_an_invertible_matrix_become_equal():
    a, b = pair(7, 3, 5)
    for seed in range(5):
        r = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
        for found, expected in zip(canonical_pair(r.inverse() @ a, b @ r), canonical_pair(a, b), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_it_is_its_own_canonical_form():
    once = canonical_pair(*pair(7, 3, 5))
    for found, expected in zip(canonical_pair(*once), once, strict=True):
        torch.testing.assert_close(found, expected)


def test_convolutions_and_half_precision():
    a, b = pair(4, 2, 3 * 9)
    a, b = a.reshape(2, 3, 3, 3).bfloat16(), b.reshape(4, 2, 1, 1).bfloat16()
    new_a, new_b = canonical_pair(a, b)
    assert (new_a.shape, new_b.shape, new_a.dtype, new_b.dtype) == (a.shape, b.shape, torch.bfloat16, torch.bfloat16)
    product = [y.flatten(1).double() @ x.flatten(1).double() for x, y in ((a, b), (new_a, new_b))]
    torch.testing.assert_close(*product, atol=0.15, rtol=0.02)


def test_an_untrained_adapter_is_zero():
    a, b = pair(4, 2, 3)
    new_a, new_b = canonical_pair(a, torch.zeros_like(b))
    assert not new_a.any() and not new_b.any()
