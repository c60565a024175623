"""Distances of outputs against one network after the other, and against what must not count."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pdiff.method.alignment.groups import permute
from pdiff.method.alignment.symmetries import permutation_groups
from pdiff.method.collection import Collection
from pdiff.networks import datasets
from pdiff.networks.architectures import build
from pdiff.networks.behaviour import output_distances
from pdiff.networks.options import Dataset


@pytest.fixture(scope="module")
def images():
    return datasets.load(Dataset(name="digits"))


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(name, pretrained=False, classes=10, channels=1, image_size=8).eval()


def collection(name: str, seeds: range) -> Collection:
    return Collection.stack([network(name, seed).state_dict() for seed in seeds])


@pytest.mark.parametrize("name", ["mlp", "cnn_small"])
def test_distances_are_those_of_single_networks_on_all_images(images, name: str) -> None:
    """Of as many draws as images the mean comes near to that over all of them, wherever few are drawn at a time."""
    found, true = collection(name, range(3)), collection(name, range(3, 6))
    everything = next(images.train.batches(len(images.train)))[0]
    expected = []
    for k in range(3):
        a, b = (functional_call(network(name, 9), dict(c[k]), (everything,)) for c in (found, true))
        difference = a.log_softmax(-1) - b.log_softmax(-1)  # differs from that of the logits by a constant an image
        expected.append((difference - difference.mean(-1, keepdim=True)).square().mean())
    distances = output_distances(network(name, 9), images.train, images=len(everything))
    torch.manual_seed(0)
    measured = torch.stack([distances(found.tensors, true.tensors) for _ in range(5)]).mean(0)
    torch.testing.assert_close(measured, torch.stack(expected), rtol=0.05, atol=0.0)


def test_equal_functions_are_at_no_distance_and_gradients_reach_the_first_alone(images) -> None:
    both = collection("mlp", range(4))
    groups = permutation_groups(network("mlp", 0), torch.zeros(1, 1, 8, 8))
    order = {group.name: torch.randperm(group.size).expand(4, -1) for group in groups.groups}
    moved = dict(permute(both, groups, order).tensors)
    bias = next(name for name in reversed(moved) if name.endswith("bias"))
    moved[bias] = moved[bias] + 3.0  # of all logits
    distances = output_distances(network("mlp", 9), images.train, images=16)
    assert distances(moved, both.tensors).max() < 1e-8

    def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}

    found, true = leaves(both.tensors), leaves(collection("mlp", range(4, 8)).tensors)
    distances(found, true).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in found.values())
    assert all(tensor.grad is None for tensor in true.values())


def test_images_change_with_every_call_and_are_training_images(images) -> None:
    few = collection("mlp", range(2))
    distances = output_distances(network("mlp", 9), images.train, images=4)
    torch.manual_seed(0)
    first, second = (distances(few.tensors, few.select([1, 0]).tensors) for _ in range(2))
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, distances(few.tensors, few.select([1, 0]).tensors))
    with pytest.raises(TypeError, match="expected a TrainingPart"):
        output_distances(network("mlp", 9), images.test, images=4)
