"""Networks by name: published sizes, one contract for every entry, and pretrained weights that are not to be had."""

import timm
import torch
from pytest import MonkeyPatch, mark, raises

from pdiff.architectures import ARCHITECTURES, build, known_architectures
from pdiff.errors import UserError


def make(name: str, *, classes: int = 10, channels: int = 3, image_size: int = 32, pretrained: bool = False):
    torch.manual_seed(0)
    return build(name, pretrained=pretrained, classes=classes, channels=channels, image_size=image_size)


@mark.parametrize(
    ("name", "channels", "image_size", "parameters", "statistics"),
    [("mlp", 1, 8, 2410, 0), ("cnn_small", 1, 8, 1946, 48), ("cnn_medium", 3, 32, 10853, 0)],
)
def test_sizes(name, channels, image_size, parameters, statistics):
    network = make(name, channels=channels, image_size=image_size)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(b.numel() for b in network.buffers() if b.is_floating_point()) == statistics


@mark.parametrize("channels", [1, 3])
@mark.parametrize("name", ARCHITECTURES)
def test_contract(name, channels):
    network, again = (make(name, classes=7, channels=channels).eval() for _ in range(2))
    images = torch.randn(4, channels, 32, 32)
    logits = network(images)
    assert logits.shape == (4, 7)
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert torch.equal(again(images), logits)  # the same seed gives the same network
    torch.testing.assert_close(network(images[2:3]), logits[2:3])  # images do not see one another
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert name in known_architectures()


def test_cnn_medium_needs_its_size():
    with raises(UserError, match=r"cnn_medium needs dataset\.image_size 32, but got 28"):
        make("cnn_medium", image_size=28)


def test_timm_by_name():
    assert set(timm.list_models()) <= set(known_architectures())
    network = make("resnet18", classes=1000)
    assert sum(p.numel() for p in network.parameters()) == 11_689_512  # as torchvision documents
    assert make("vit_tiny_patch16_224", classes=5).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert make("resnet10t", channels=1).conv1[0].in_channels == 1


@mark.parametrize("name", ["mlp", "botnet50ts_256"])
def test_pretrained_weights_that_nobody_has(name):
    with raises(UserError, match=f"no pretrained weights of {name}"):
        make(name, pretrained=True)


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: MonkeyPatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with raises(UserError, match=r"network\.pretrained: the weights of resnet18 \(timm/resnet18\.\w+\)") as caught:
        make("resnet18", pretrained=True)
    assert "HF_HOME" in str(caught.value)
    assert "\n" not in str(caught.value)
