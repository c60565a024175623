"""A network in two parts computes the same, to the last bit, with as little as possible in the suffix."""

import operator
from fnmatch import fnmatchcase

import numpy as np
import timm
import torch
import torch.nn.functional as F
from pytest import fixture, mark, raises
from torch import Tensor, fx, nn

from pdiff.networks.split import shrink, split


class Residual(nn.Module):
    """Two branches, of which the generated one begins late; a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(48, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale, self.act = nn.Parameter(torch.full((6,), 1.5)), nn.ReLU(inplace=True)
        self.register_buffer("shift", torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.act(self.stem(x.flatten(1)))
        left = self.left(stem) * self.scale
        left += stem
        return left + self.right(stem) + self.shift


class Untraceable(nn.Module):
    """Looks at its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        return self.second(x) if x.sum() > 0 else self.second(-x)


NETWORKS = {
    "resnet18": (lambda: timm.create_model("resnet18", num_classes=10), 32),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=2), 32),
    "convnext": (lambda: timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 1, 1)), 32),
    "residual": (Residual, 4),
    "untraceable": (Untraceable, 4),
}


@fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: make().eval() for name, (make, _) in NETWORKS.items()}


CASES = [
    ("resnet18", "layer4.1.bn?.weight"),
    ("resnet18", "layer4.0.downsample.1.*"),
    ("resnet18", "*"),
    ("vit", "norm.*"),
    ("vit", "blocks.1.mlp.fc1.*"),
    ("vit", "pos_embed"),
    ("convnext", "head.norm.*"),
    ("residual", "right.weight"),
    ("residual", "left.*"),
    ("residual", "scale"),
    ("residual", "shift"),
    ("residual", "*"),
    ("untraceable", "second.weight"),
]


@mark.parametrize(("name", "pattern"), CASES)
@torch.no_grad()
def test_split_is_the_network(networks, name, pattern):
    network, size = networks[name], NETWORKS[name][1]
    generated = [n for n in network.state_dict() if fnmatchcase(n, pattern)]
    assert generated
    x = torch.randn(2, 3, size, size)
    prefix, suffix = split(network, generated)
    activations = prefix(x)
    logits = network(x)
    assert torch.equal(suffix(*activations), logits)
    before = {n: t.clone() for n, t in network.state_dict().items()}
    try:
        for n in generated:
            network.state_dict()[n].add_(1)
        for found, expected in zip(prefix(x), activations, strict=True):
            assert found is expected or torch.equal(found, expected)  # computed without anything that is generated
        assert not torch.equal(network(x), logits)
        assert torch.equal(suffix(*activations), network(x))
    finally:
        network.load_state_dict(before)


def test_the_suffix_is_short(networks):
    _, suffix = split(networks["resnet18"], ["layer4.1.bn1.weight", "layer4.1.bn2.bias"])
    assert [n for n, t in suffix.state_dict().items() if t.ndim == 4] == ["layer4.1.conv2.weight"]
    _, suffix = split(networks["vit"], ["norm.bias"])
    assert {n.split(".")[0] for n in suffix.state_dict()} == {"norm", "head"}
    _, suffix = split(networks["residual"], ["right.bias"])
    assert set(suffix.state_dict()) == {"right.weight", "right.bias"}


def test_gradients_reach_generated_parameters_through_the_suffix(networks):
    network = networks["residual"]
    prefix, suffix = split(network, ["left.weight"])
    x = torch.randn(2, 3, 4, 4)
    (expected,) = torch.autograd.grad(network(x).square().sum(), network.left.weight)
    with torch.no_grad():
        activations = prefix(x)
    (found,) = torch.autograd.grad(suffix(*activations).square().sum(), network.left.weight)
    assert torch.equal(found, expected)


@mark.parametrize("name", ["residual", "untraceable"])
def test_all_generated_or_untraceable_is_all_suffix(networks, name):
    network = networks[name]
    prefix, _ = split(network, list(network.state_dict()))
    x = torch.randn(2, 3, 4, 4)
    (passed,) = prefix(x)
    assert torch.equal(passed.flatten(), x.flatten())


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return 2 * x


def refused(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise LookupError("expected a tensor,\nbut got something else")
    return x


TABLE = {4: 1.0}
UNTRACEABLE = {  # operations that look at their input -> what tracing them raises
    "TraceError: symbolically traced variables": lambda x: x if x.sum() > 0 else -x,
    "TraceError: Proxy object cannot be iterated": lambda x: x.view(*x.shape),
    "RuntimeError: 'len' is not supported": lambda x: x if len(x) else -x,
    "RuntimeError: scripted()": scripted,
    "TypeError: ": lambda x: torch.stack([x[:, k] for k in range(x.shape[1])], dim=1),
    "KeyError: ": lambda x: x * TABLE[x.shape[1]],
    "ValueError: ": lambda x: x * torch.tensor(np.sqrt(x.shape[1])),
    "LookupError: expected a tensor": refused,
}


class Looking(nn.Module):
    """Two layers, and between them something that looks at its input."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.first, self.second, self.operation = nn.Linear(4, 4), nn.Linear(4, 4), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self.first(x)))


@mark.parametrize("reason", UNTRACEABLE)
@torch.no_grad()
def test_a_network_that_cannot_be_traced_is_all_suffix_and_this_is_said_once(reason, capsys):
    network, x = Looking(UNTRACEABLE[reason]).eval(), torch.randn(3, 4)
    for _ in range(2):
        prefix, suffix = split(network, ["second.weight"])
        assert suffix is network
        assert torch.equal(suffix(*prefix(x)), network(x))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: Looking is computed as a whole for every checkpoint: ")
    assert reason in line


def test_nothing_is_said_of_networks_that_are_split(networks, capsys):
    split(networks["residual"], ["right.weight"])
    split(networks["residual"], list(networks["residual"].state_dict()))  # all generated: nothing to split off
    assert not capsys.readouterr().out


def test_views_of_what_changes_in_place_are_said_once(capsys):
    class Viewing(InPlace):
        """A name of its own, since it is said once of each."""

    for _ in range(2):
        split(Viewing(through_a_view).eval(), ["second.weight"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: Viewing is computed as a whole") and "view" in line


def test_a_bug_in_the_tracer_is_not_hidden(monkeypatch):
    monkeypatch.setattr(fx.Proxy, "__init__", operator.index)  # of C: the last line of Python is one of the tracer
    with raises(TypeError, match="index"):
        split(Residual(), ["right.weight"])


def test_splitting_means_evaluation_mode():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Dropout(0.5), nn.BatchNorm1d(6))
    x = torch.randn(4, 3, 4, 4)
    prefix, suffix = split(network.train(), ["3.weight"])
    with torch.no_grad():
        assert torch.equal(suffix(*prefix(x)), suffix(*prefix(x)))
    assert network[3].num_batches_tracked == 0


def test_shrink_keeps_what_a_network_computes_and_the_network_itself() -> None:
    """Convolutions of 1 x 1 images, with and without bias, stride, dilation and groups; one generated, one larger."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(6, 4, (3, 5), padding=(1, 4), dilation=(1, 2), bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 4, 3, padding=1),
    ).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generated = ["0.weight", "0.bias", "4.weight", "4.bias"]
    for size, kept in ((1, [False, False, True, True]), (3, [True] * 4)):
        images = torch.randn(5, 4, size, size)
        expected = network(images)
        prefix, suffix = split(network, generated)
        suffix = shrink(suffix, prefix(images), generated)
        assert [isinstance(suffix.get_submodule(str(k)), nn.Conv2d) for k in range(1, 5)] == kept
        torch.testing.assert_close(suffix(*prefix(images)), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network[1].kernel_size == (3, 3)


def relu_of_what_is_read_before(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    second = net.second(first)
    return second + net.act(first)


def relu_whose_result_is_not_used(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    net.act(first)
    return net.second(first) + first


def relu_method(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    second = net.second(first)
    first.relu_()
    return second * first


def relu_function(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    second = net.second(first)
    return F.relu(first, True) + second + F.leaky_relu(first, inplace=True) + first + torch.relu_(first)


def sum_across_the_cut(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    return first.add_(net.second(first)) + first


def augmented_sum(net: nn.Module, x: Tensor) -> Tensor:
    first = same = net.first(x)
    first += net.second(first)
    first *= 2
    return first + same


def images_change(net: nn.Module, x: Tensor) -> Tensor:
    x -= 0.5
    return net.second(net.first(x)) + x.mul_(2)


def through_dropout(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    second = net.second(first)
    return net.act(net.dropout(first)) + second + first


def through_a_view(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    half = first[:, 2:]
    second = net.second(first)
    first.relu_()
    return torch.cat([second, half], dim=1)


def filled(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    second = net.second(first)
    first.zero_()
    return second + first + 1


IN_PLACE = [
    *(relu_of_what_is_read_before, relu_whose_result_is_not_used, relu_method, relu_function, sum_across_the_cut),
    *(augmented_sum, images_change, through_dropout, through_a_view, filled),
]


class InPlace(nn.Module):
    """Some operations in place, on 4 numbers."""

    def __init__(self, operations) -> None:
        super().__init__()
        self.first, self.second, self.operations = nn.Linear(4, 4), nn.Linear(4, 4), operations
        self.act, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.operations(self, x)


@mark.parametrize("generated", ["first.weight", "second.weight"])
@mark.parametrize("operations", IN_PLACE)
@torch.no_grad()
def test_operations_in_place(operations, generated):
    """They change neither what crosses the cut, nor the network."""
    torch.manual_seed(0)
    network = InPlace(operations).eval()
    x = torch.randn(5, 4)
    expected = network(x.clone())
    prefix, suffix = split(network, [generated])
    activations = prefix(x.clone())
    for _ in range(2):
        assert torch.equal(suffix(*activations), expected)
    assert network.act.inplace and torch.equal(network(x.clone()), expected)


def test_operations_in_place_do_not_prevent_a_prefix():
    for operations in set(IN_PLACE) - {through_dropout, through_a_view, filled}:
        _, suffix = split(InPlace(operations).eval(), ["second.bias"])
        assert "first.weight" not in suffix.state_dict(), operations


def test_untraceable_networks_do_not_change_their_images(monkeypatch):
    class Changing(Untraceable):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return super().forward(x)

    network = Changing().eval()
    prefix, suffix = split(network, ["second.weight"])
    activations = prefix(torch.randn(2, 3, 4, 4))
    assert torch.equal(suffix(*activations), suffix(*activations))
    clone, copies = Tensor.clone, []
    monkeypatch.setattr(Tensor, "clone", lambda x: copies.append(x) or clone(x))
    split(network, ["second.weight"]).suffix(*activations)
    assert len(copies) == 1, "images are copied once however often a network is split"
