"""Predictions of a collection against one network after the other, each with its own state dict loaded."""

import math
from collections.abc import Callable

import pytest
import timm
import torch
from oracle import one_by_one, perturbed, pictures, softmax_one_by_one
from torch import Tensor, nn

from pdiff.method.collection import Collection
from pdiff.networks import predict
from pdiff.networks.architectures import build
from pdiff.networks.images import Part
from pdiff.networks.predict import (
    VOTE_SUBSETS,
    Predicted,
    Scores,
    accuracy,
    batch_predictions,
    network_accuracy,
    predictions,
    vote_subsets,
)


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


def scores(network: nn.Module, collection: Collection, images: Part, **options) -> Predicted:
    """Scores of one collection on all images."""
    (batches,) = zip(*batch_predictions(network, [collection], images, **options), strict=True)
    parts = [[torch.cat(values, dim=1) for values in zip(*some, strict=True)] for some in zip(*batches, strict=True)]
    return Predicted(*(Scores(*values) for values in parts))


@pytest.mark.parametrize("chunk", [1, 8 << 20])
@pytest.mark.parametrize("name", ["mlp", "cnn_small"])  # vectorised, and in turn
def test_scores_are_those_of_the_networks_and_of_their_mean_probabilities(monkeypatch, name, chunk):
    monkeypatch.setattr(predict, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    network, images = small(name), pictures(20, 1, 8)
    collection = perturbed(network, ["all"], 9)
    p = softmax_one_by_one(network, collection, images)
    subsets = [members for some in vote_subsets(9).values() for members in some]
    means = torch.stack([p[members].mean(dim=0) for members in subsets])
    found = scores(network, collection, images, batch_size=7)
    for got, expected in zip(found, (p, means), strict=True):
        assert torch.equal(got.predicted.long(), expected.argmax(dim=-1))
        torch.testing.assert_close(got.confidence, expected.amax(dim=-1))
        labels = images.labels.expand(len(expected), -1)
        likelihood = expected.double().gather(-1, labels[..., None])[..., 0]
        torch.testing.assert_close((-got.nll.double()).exp(), likelihood, rtol=1e-4, atol=1e-7)
        assert got.nll.dtype == got.confidence.dtype == torch.float32


def test_votes_are_of_random_subsets():
    assert vote_subsets(1) == {}
    three = vote_subsets(3)
    assert list(three) == [2] and three[2].tolist() == [[0, 1], [0, 2], [1, 2]]
    many = vote_subsets(40)
    assert list(many) == [2, 4, 8, 16, 32]
    assert [len(vote_subsets(count)[32]) for count in (32, 33)] == [1, VOTE_SUBSETS]
    for size, subsets in many.items():
        assert subsets.shape == (VOTE_SUBSETS, size) and subsets.min() >= 0 and subsets.max() < 40
        assert all(len(set(members)) == size for members in subsets.tolist())
        assert len({frozenset(members) for members in subsets.tolist()}) > 1
        assert torch.equal(subsets, vote_subsets(40)[size])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_undefined_probabilities_are_wrong_and_add_nothing_to_votes(value):
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), pictures(12, 1, 8)
    g = torch.Generator().manual_seed(0)
    bias = torch.randn(4, 10, generator=g)
    bias[2:, 4] = value
    collection = Collection({"1.bias": bias})
    found = scores(network, collection, images)
    p = softmax_one_by_one(network, collection.select([0, 1]), images)
    subsets = vote_subsets(4)[2].tolist()
    undefined = subsets.index([2, 3])
    for got, k in ((found.networks, 2), (found.networks, 3), (found.votes, undefined)):
        assert not (got.predicted[k] == images.labels).any() and (got.predicted[k] < 10).all()
        assert (got.nll[k] == torch.inf).all() and (got.confidence[k] == 1).all()
    half = subsets.index([0, 2])
    assert torch.equal(found.votes.predicted[half].long(), p[0].argmax(dim=-1))
    torch.testing.assert_close(found.votes.confidence[half], p[0].amax(dim=-1) / 2)
    assert found.networks.nll[:2].isfinite().all() and found.votes.nll[half].isfinite().all()


def test_probabilities_too_small_for_a_number_have_a_likelihood():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(network[1].weight)
    bias = torch.zeros(2, 10)
    bias[0, 0], bias[1, 0] = 500.0, 600.0
    images = pictures(30, 1, 8)
    found = scores(network, Collection({"1.bias": bias}), images)
    wrong = images.labels != 0
    assert wrong.any() and torch.equal(found.networks.nll[0][wrong], torch.full_like(found.networks.nll[0][wrong], 500))
    vote = found.votes.nll[0][wrong]
    torch.testing.assert_close(vote, torch.full_like(vote, 500 + math.log(2)))


def test_labels_without_an_output_have_no_likelihood():
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), pictures(30, 1, 8)
    found = scores(network, perturbed(network, ["all"], 2), images)
    for some in found:
        assert torch.equal(some.nll == torch.inf, (images.labels >= 4).expand(len(some.nll), -1))
        assert some.predicted.max() < 4


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
