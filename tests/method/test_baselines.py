"""Baselines in their units, and against a loop."""

from statistics import fmean

import pytest
import torch

from pdiff.method.baselines import average, noisy
from pdiff.method.collection import Collection
from pdiff.method.standardize import Standardizer


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
    noise = standardizer.encode(noisy(collection, standardizer, scale=scale, seed=1)) - standardizer.encode(collection)
    for part in noise.split([300, 400, 200], dim=1):
        assert part.std().item() == pytest.approx(scale, rel=0.05, abs=1e-5)
        assert part.mean().item() == pytest.approx(0, abs=5 * scale / part.numel() ** 0.5 + 1e-5)
    distances = torch.pdist(noise)
    assert scale == 0 or distances.min() > scale  # every network gets noise of its own


def test_noise_follows_its_seed(mixed: Collection) -> None:
    standardizer = Standardizer.fit(mixed)
    one, again, other = (noisy(mixed, standardizer, scale=0.1, seed=seed) for seed in (1, 1, 2))
    assert list(one.tensors) == list(mixed.tensors)
    assert torch.equal(one.tensors["weight"], again.tensors["weight"])
    assert not torch.equal(one.tensors["weight"], other.tensors["weight"])
    assert set(one.tensors["norm.num_batches_tracked"].tolist()) == {10}


def test_average_against_a_loop(mixed: Collection) -> None:
    found = average(mixed)
    assert len(found) == 1 and list(found.tensors) == list(mixed.tensors)
    for name, tensor in mixed.tensors.items():
        (mean,) = found.tensors[name]
        assert mean.dtype == tensor.dtype and mean.shape == tensor.shape[1:]
        if not tensor.is_floating_point():
            assert torch.equal(mean, tensor[0])
            continue
        columns = tensor.double().flatten(1).T.tolist()
        expected = torch.tensor([fmean(column) for column in columns], dtype=torch.float64)
        assert torch.allclose(mean.double().flatten(), expected, rtol=1e-3 if name == "half" else 1e-6, atol=1e-7)


def test_average_of_many_half_precision_networks_does_not_overflow() -> None:
    tensors = {"a": torch.full((300, 2), 6e4).half(), "b": torch.full((3000, 1), 0.1)[:300]}
    found = average(Collection(tensors)).tensors
    assert torch.equal(found["a"], tensors["a"][:1]) and torch.equal(found["b"], tensors["b"][:1])
