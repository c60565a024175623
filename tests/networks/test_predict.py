"""Predictions of a collection against one network after the other, each with its own state dict loaded."""

from collections.abc import Callable

import pytest
import timm
import torch
from oracle import one_by_one, perturbed, pictures
from torch import Tensor, nn

from pdiff.method.collection import Collection
from pdiff.networks import predict
from pdiff.networks.architectures import build
from pdiff.networks.predict import accuracy, network_accuracy, predictions


class Unused(nn.Module):
    """Has a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(64, 5), nn.Linear(5, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)).relu())


class Sign(Unused):
    """Looks at shapes in a way that torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 0 else x


def small(name: str) -> nn.Module:
    return build(name, pretrained=False, classes=10, channels=1, image_size=8)


def resnet18() -> nn.Module:
    return timm.create_model("resnet18", num_classes=300)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mlp": (lambda: small("mlp"), ["all"]),
    "mlp, one tensor": (lambda: small("mlp"), ["3.weight"]),
    "cnn with statistics": (lambda: small("cnn_small"), ["all"]),
    "cnn, norms and statistics": (lambda: small("cnn_small"), ["1.*", "5.*"]),
    "resnet18, last norms": (resnet18, ["layer4.1.bn?.weight", "layer4.1.bn?.bias"]),
    "resnet18, a shortcut": (resnet18, ["layer4.0.downsample.1.*"]),
    "untraceable": (Sign, ["second.*", "unused.*"]),
    "a layer of no use": (Unused, ["all"]),
}
CASES = [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("resnet18")) for name in NETWORKS]


@pytest.mark.parametrize("chunk", [1, 8 << 20])
@pytest.mark.parametrize("case", CASES)
def test_predictions_are_those_of_the_networks(monkeypatch, case, chunk):
    monkeypatch.setattr(predict, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    make, patterns = NETWORKS[case]
    network = make()
    images = pictures(6, 3, 32) if make is resnet18 else pictures(30, 1, 8)
    collection = perturbed(network, patterns, 5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = predictions(network, collection, images, batch_size=7, device="cpu")
    expected = one_by_one(network, collection, images)
    assert torch.equal(found.long(), expected)
    assert found.dtype == (torch.int16 if make is resnet18 else torch.uint8)
    assert len(expected.unique(dim=0)) > 1  # so that the order is tested
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])  # the base network is what it was


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (257, torch.int16)])
def test_many_classes_fit(classes, dtype):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    bias = torch.full((2, classes), -1e4)
    bias[0, classes - 1] = bias[1, 3] = 1e4
    found = predictions(network, Collection({"1.bias": bias}), pictures(4, 1, 8))
    assert found.dtype == dtype
    assert found.tolist() == [[classes - 1] * 4, [3] * 4]


def test_half_precision_checkpoints_are_those_numbers():
    network = small("mlp")
    half = Collection({n: t.half() for n, t in perturbed(network, ["all"], 3).tensors.items()})
    single = Collection({n: t.float() for n, t in half.tensors.items()})
    images = pictures(20, 1, 8)
    assert torch.equal(predictions(network, half, images), predictions(network, single, images))


def test_accuracy_is_the_share_of_right_ones():
    predicted = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0], [3, 2, 1, 0]], dtype=torch.uint8)
    assert accuracy(predicted, torch.tensor([0, 1, 0, 3])).tolist() == [0.75, 0.5, 0.0]


@pytest.mark.parametrize("training", [True, False])
def test_network_accuracy_is_that_of_its_predictions(training):
    torch.manual_seed(0)
    network = small("cnn_small").train(training)
    images = pictures(50, 1, 8)
    found = network_accuracy(network, images, batch_size=16, device="cpu")
    assert network.training is training
    assert network[1].num_batches_tracked == 0
    right = sum(int(network.eval()(x).argmax() == y) for x, y in images.batches(1))
    assert found == right / 50
