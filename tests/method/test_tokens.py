"""Tokens of networks against permutations of their units, and against a layout written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.method.alignment.groups import Group, Groups, Place, permute
from pdiff.method.alignment.symmetries import permutation_groups
from pdiff.method.collection import Collection, generated_tensors
from pdiff.method.denoisers.graph import GraphDenoiser
from pdiff.method.standardize import Slot, Standardizer
from pdiff.method.tokens import Layout, Tokens, arranged
from pdiff.networks.architectures import ARCHITECTURES, build

SIZES = {"mlp": (1, 8), "mlp_deep": (1, 8), "cnn_small": (1, 8), "cnn_medium": (3, 32), "convnext_mini": (3, 32)}
SLOW = {"vit_mini", "convnext_mini", "convnet_mini", "cnn_medium"}


class Residual(nn.Module):
    """A stem and a block on one stream, with BatchNorm: the units of stem and block are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.square, self.head = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + F.relu(self.square(x))).mean((2, 3)))


def example(name: str) -> tuple[Groups, Collection]:
    """The groups of an architecture, and networks of it with random numbers everywhere."""
    channels, size = SIZES.get(name, (3, 16)) if name != "residual" else (1, 8)
    torch.manual_seed(0)
    sizes = {"classes": 10, "channels": channels, "image_size": size}
    network = Residual() if name == "residual" else build(name, pretrained=False, **sizes)
    groups = permutation_groups(network, torch.randn(1, channels, size, size))
    states = [
        {n: t + 0.1 * torch.rand(t.shape) if t.is_floating_point() else t for n, t in network.state_dict().items()}
        for _ in range(3)
    ]
    return groups.within(generated_tensors(states[0])), Collection.stack(states)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in (*ARCHITECTURES, "residual")],
)
def test_tokens_hold_every_number_once_and_the_denoiser_keeps_every_symmetry(name: str) -> None:
    groups, collection = example(name)
    standardizer = Standardizer.fit(collection)
    x = standardizer.encode(collection)
    tokens = Tokens.fit(x, standardizer.slots, groups.groups)
    assert tokens.layout.size == x.shape[1] and len(tokens.layout.nodes) == len(groups)
    z = tokens.encode(x)
    torch.testing.assert_close(tokens.decode(z), x, rtol=1e-5, atol=1e-5)

    generator = torch.Generator().manual_seed(1)
    shuffles = {g.name: torch.stack([torch.randperm(g.size, generator=generator) for _ in range(3)]) for g in groups}

    def permuted(z: Tensor) -> Tensor:
        return tokens.encode(standardizer.encode(permute(standardizer.decode(tokens.decode(z)), groups, shuffles)))

    assert (permuted(z) - z).abs().max() > 0.1
    torch.testing.assert_close(tokens.layout.unordered(permuted(z)), tokens.layout.unordered(z), rtol=1e-4, atol=1e-4)
    denoiser = GraphDenoiser(tokens.layout.config(), width=16, blocks=2, heads=2, edge_width=8).eval()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    t = torch.tensor([20.0, 500.0, 900.0])
    with torch.no_grad():
        found, expected = denoiser(permuted(z), t), permuted(denoiser(z, t))
    assert (found - expected).abs().max() < 1e-3 * found.abs().max()
    assert (found - denoiser(z, t)).abs().max() > 0.05 * found.abs().max()


def test_the_tokens_of_an_mlp_are_rows_and_columns_of_its_weights() -> None:
    groups, collection = example("mlp")
    standardizer = Standardizer.fit(collection)
    x = standardizer.encode(collection)
    tokens = Tokens.fit(x, standardizer.slots, groups.groups)
    assert tokens.layout == Layout(((32, 64 + 1 + 10),), (), 10)
    columns = x.split([slot.size for slot in standardizer.slots], dim=1)
    parts = {s.name: p.unflatten(1, s.shape) for s, p in zip(standardizer.slots, columns, strict=True)}
    units = torch.cat([parts["1.weight"], parts["1.bias"][:, :, None], parts["3.weight"].transpose(1, 2)], dim=2)
    mean, std = units.mean((0, 1)), units.flatten(0, 1).std(0, correction=0)
    nodes, rest = tokens.layout.split(tokens.encode(x))
    torch.testing.assert_close(nodes, (units - mean) / std, rtol=1e-4, atol=1e-4)
    bias = parts["3.bias"]
    torch.testing.assert_close(rest, (bias - bias.mean(0)) / bias.std(0, correction=0), rtol=1e-3, atol=1e-3)


def test_edges_are_the_weights_between_two_units() -> None:
    """Two hidden layers: the weight from unit j to unit i is the edge of their nodes."""
    network = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    groups = permutation_groups(network, torch.zeros(1, 5))
    collection = Collection.stack([network.state_dict()])
    standardizer = Standardizer.fit(collection)
    layout, order = arranged(standardizer.slots, groups.groups)
    assert layout == Layout(((3, 5 + 1), (4, 1 + 2)), ((0, 1, 1),), 2)
    first, second, edges, rest = layout.split(standardizer.encode(collection)[:, order])
    slot = {slot.name: slot for slot in standardizer.slots}
    weight = (network[2].weight.detach() - slot["2.weight"].mean) / slot["2.weight"].std
    torch.testing.assert_close(edges[0, :, :, 0], weight.T)
    assert first.shape == (1, 3, 6) and second.shape == (1, 4, 3) and rest.shape == (1, 2)


def test_units_along_three_axes_and_networks_without_units_are_refused() -> None:
    places = [Place("w", axis, 0, 1, axis == 0) for axis in range(3)]
    groups = [Group(f"g{place.axis}", 2, (place,)) for place in places]
    with pytest.raises(ValueError, match="tensor w has units along 3 axes, expected at most 2"):
        arranged([Slot("w", (2, 2, 2), "float32", 0.0, 1.0)], groups)
    with pytest.raises(ValueError, match="no interchangeable units"):
        arranged([Slot("w", (2, 2), "float32", 0.0, 1.0)], [])


def test_numbers_sorted_along_the_units_are_no_further_apart_than_networks_in_any_order() -> None:
    layout = Layout(((4, 3), (3, 2)), ((0, 1, 2),), 5)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, layout.size, generator=generator)
    distance = (layout.unordered(a) - layout.unordered(b)).norm(dim=1)
    for _ in range(20):
        p, q = torch.randperm(4, generator=generator), torch.randperm(3, generator=generator)
        first, second, edges, rest = layout.split(b)
        other = [first[:, p], second[:, q], edges[:, p][:, :, q], rest]
        assert (distance <= (a - torch.cat([part.flatten(1) for part in other], dim=1)).norm(dim=1) + 1e-4).all()
