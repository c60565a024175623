"""Small random collections and images, and predictions one network and one image at a time."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pdiff.method.collection import Collection
from pdiff.networks.images import Part, Pixels
from pdiff.networks.options import Dataset
from pdiff.networks.populations import generated_names


def pictures(count: int, channels: int, size: int) -> Part:
    """Random images and labels."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=g)
    return Part(Pixels(images, torch.randint(0, 10, (count,), generator=g)), Dataset(name="any"))


def perturbed(network: nn.Module, patterns: list[str], count: int) -> Collection:
    """Checkpoints that differ a lot from one another; variances stay positive."""
    torch.manual_seed(1)
    state = network.state_dict()
    tensors = {}
    for name in generated_names(network, patterns):
        copies = state[name].expand(count, *state[name].shape).clone()
        if name.endswith("running_var"):
            copies *= torch.rand_like(copies) * 2 + 0.1
        elif copies.is_floating_point():
            copies += torch.randn_like(copies)
        tensors[name] = copies
    return Collection(tensors)


@torch.no_grad()
def softmax_one_by_one(network: nn.Module, collection: Collection, images: Part) -> Tensor:
    """The oracle: probabilities (N, images, classes) by the whole network, checkpoint by checkpoint."""
    rows = []
    for state in collection:
        own = network.state_dict() | state
        network.eval()
        rows.append(torch.cat([functional_call(network, own, batch).softmax(-1) for batch, _ in images.batches(3)]))
    return torch.stack(rows)


@torch.no_grad()
def one_by_one(network: nn.Module, collection: Collection, images: Part) -> Tensor:
    """The oracle: the whole network, checkpoint by checkpoint, image by image."""
    rows = []
    for state in collection:
        own = copy.deepcopy(network).eval()
        own.load_state_dict(network.state_dict() | state)
        rows.append([int(own(batch).argmax()) for batch, _ in images.batches(1)])
    return torch.tensor(rows)
