"""Running statistics against PyTorch's own, and against the mean and variance that they stand for."""

import pytest
import torch
from torch import nn

from pdiff.errors import UserError
from pdiff.method.collection import Collection
from pdiff.networks import batchnorm, datasets
from pdiff.networks.architectures import build
from pdiff.networks.options import Dataset
from pdiff.seeds import stream


@pytest.fixture(scope="module")
def images():
    return datasets.load(Dataset(name="digits"))


def cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build("cnn_small", pretrained=False, classes=10, channels=1, image_size=8)


def collection() -> Collection:
    return Collection.stack([cnn(seed).state_dict() for seed in range(3)])


def test_recomputed_as_torch_measures_one_network(images):
    found = batchnorm.recomputed(collection(), cnn(9), images.train, images=500)
    batches = images.train.stream(250, seed=stream(0, "batchnorm"))
    network = cnn(1).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(2):
            network(next(batches)[0])
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_the_first_layer_sees_the_mean_and_variance_of_its_inputs(images):
    found = batchnorm.recomputed(collection(), cnn(9), images.train, images=250)
    x, _ = next(images.train.stream(250, seed=stream(0, "batchnorm")))
    activations = nn.functional.conv2d(x, found[2]["0.weight"], found[2]["0.bias"], padding=1)
    expected = activations.mean((0, 2, 3)), activations.var((0, 2, 3))
    torch.testing.assert_close((found[2]["1.running_mean"], found[2]["1.running_var"]), expected, rtol=1e-4, atol=1e-5)


def test_what_is_learned_stays(images):
    before, after = collection(), batchnorm.recomputed(collection(), cnn(9), images.train, images=10)
    changed = {name for name, tensor in after.tensors.items() if not torch.equal(tensor, before.tensors[name])}
    assert changed == set(batchnorm.statistics(before, cnn(9)))


@pytest.mark.parametrize("part", ["test", "validation"])
def test_images_that_networks_are_judged_on_are_not_accepted(images, part):
    with pytest.raises(TypeError, match="training images alone"):
        batchnorm.recomputed(collection(), cnn(9), getattr(images, part), images=10)


def test_every_group_is_measured_on_the_same_images(images):
    found = [batchnorm.recomputed(collection(), cnn(9), images.train, images=10, label=name) for name in "ab"]
    assert all(torch.equal(tensor, found[1].tensors[name]) for name, tensor in found[0].tensors.items())


def test_negative_variances_are_raised_to_the_smallest_of_the_originals(images, capsys):
    """A network with one computes NaN; what is not below the smallest, and every other tensor, stays."""
    originals, network = collection(), cnn(9).eval()
    originals.tensors["1.running_var"] = torch.rand(originals.tensors["1.running_var"].shape) + 0.5
    tensors = {name: tensor.clone() for name, tensor in originals.tensors.items()}
    tensors["1.running_var"][1, 2] = -1.0
    x, broken = next(images.train.stream(8, seed=0))[0], Collection(tensors, list("abc"))
    mended = batchnorm.positive(broken, originals, label="generated")
    assert torch.func.functional_call(network, broken[1], (x,)).isnan().any()
    assert torch.func.functional_call(network, mended[1], (x,)).isfinite().all()
    tensors["1.running_var"][1, 2] = originals.tensors["1.running_var"].min()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in mended.tensors.items())
    assert mended.names == list("abc")


def test_kept_are_those_of_the_base_network():
    base, found = cnn(9), None
    base.get_submodule("1").running_mean.fill_(7)
    found = batchnorm.kept(collection(), base)
    assert (found.tensors["1.running_mean"] == 7).all() and len(found) == 3


@pytest.mark.parametrize(
    ("network", "names", "message"),
    [
        ("cnn_small", ["1.weight", "1.bias"], r"lack 1\.running_mean"),
        ("mlp", ["1.weight"], "are of a network without batch normalisation"),
    ],
)
def test_nothing_to_measure(network, names, message):
    network = build(network, pretrained=False, classes=10, channels=1, image_size=8)
    state = {name: network.state_dict()[name] for name in names}
    with pytest.raises(UserError, match=f"generate.batchnorm: needs running statistics .* but they {message}"):
        batchnorm.statistics(Collection.stack([state]), network)
