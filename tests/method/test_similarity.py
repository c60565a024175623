"""Similarities against sets and loops of plain Python."""

import itertools
import math

import pytest
import torch

from pdiff.method.similarity import maxima_without_self, mean_between, wrong_iou


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_similarity_against_sets(share: float) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(6, 40, generator=g) < share, torch.rand(4, 40, generator=g) < share
    found = wrong_iou(a, b)
    assert found.shape == (6, 4)
    for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)):
        left, right = ({k for k in range(40) if wrong[k]} for wrong in (x, y))
        expected = len(left & right) / len(left | right) if left | right else 1
        assert found[i, j].item() == pytest.approx(expected)


def test_similarity_at_the_edges() -> None:
    never, always = torch.zeros(1, 5, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    assert wrong_iou(never, never).item() == 1 and wrong_iou(always, always).item() == 1
    assert wrong_iou(never, always).item() == 0 and wrong_iou(always[:, :0], always[:, :0]).item() == 1
    assert wrong_iou(never[:0], always).shape == (0, 1)


def test_similarity_is_exact_on_many_images() -> None:
    wrong = torch.zeros(2, 3_000_001, dtype=torch.bool)
    wrong[0], wrong[1, 1:] = True, True
    both = wrong_iou(wrong, wrong)
    assert torch.equal(both, both.T) and both.diagonal().tolist() == [1, 1]
    assert both[0, 1].item() == pytest.approx(3_000_000 / 3_000_001, abs=1e-7)


def test_mean_over_pairs_against_a_loop() -> None:
    s = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    pairs = [s[i, j].item() for i in range(5) for j in range(5) if i != j]
    assert mean_between(s) == pytest.approx(sum(pairs) / 20, rel=1e-5)
    assert math.isnan(mean_between(torch.ones(1, 1)))


def test_maxima_against_a_loop() -> None:
    s = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)).fill_diagonal_(1)
    before = s.clone()
    expected = [max(s[i, j].item() for j in range(6) if j != i) for i in range(6)]
    assert maxima_without_self(s).tolist() == pytest.approx(expected)
    assert torch.equal(s, before)
    assert maxima_without_self(torch.eye(3)).tolist() == [0, 0, 0]
