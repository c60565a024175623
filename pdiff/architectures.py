"""ARCHITECTURES: name -> network. Any name of timm's is known, too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pdiff.errors import UserError


def mlp(*, classes: int, channels: int, image_size: int, hidden: int = 32) -> nn.Module:
    """One hidden layer; 2 410 parameters on 8 x 8 digits."""
    inputs = channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def cnn_small(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """Two convolutions with BatchNorm; 1 946 parameters and 48 running statistics on 8 x 8 digits."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(16 * (image_size // 4) ** 2, classes),
    )


def cnn_medium(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """The paper's CNN for MNIST and SVHN, 3 x 32 x 32; 10 853 parameters with 10 classes."""
    if image_size != 32:
        raise UserError(f"network.architecture cnn_medium needs dataset.image_size 32, but got {image_size}")
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3), nn.MaxPool2d(2), nn.LeakyReLU()),
        *(nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), nn.LeakyReLU()),
        *(nn.Conv2d(32, 15, 3), nn.MaxPool2d(2), nn.LeakyReLU()),
        nn.Flatten(),
        *(nn.Linear(60, 20), nn.LeakyReLU()),
        nn.Linear(20, classes),
    )


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn_small": cnn_small, "cnn_medium": cnn_medium}


def known_architectures() -> list[str]:
    """Every name that `build` takes."""
    import timm

    return [*ARCHITECTURES, *timm.list_models()]


def build(name: str, *, pretrained: bool, classes: int, channels: int, image_size: int) -> nn.Module:
    """A network by name: one of `ARCHITECTURES`, or timm's, with its pretrained weights where asked for.

    Raises:
        UserError: there are no pretrained weights, or they are not on this machine and cannot be downloaded.
    """
    network = _built(name, pretrained=pretrained, classes=classes, channels=channels, image_size=image_size)
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(2, channels, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        size = f"{channels} x {image_size} x {image_size}"
        reason = str(error).splitlines()[0]
        raise UserError(f"network.architecture {name} does not take images of {size}: {reason}") from None
    return network.train()


def _built(name: str, *, pretrained: bool, classes: int, channels: int, image_size: int) -> nn.Module:
    """The network itself."""
    if name in ARCHITECTURES and not pretrained:
        return ARCHITECTURES[name](classes=classes, channels=channels, image_size=image_size)
    import timm

    if pretrained and not timm.is_model_pretrained(name):
        raise UserError(f"network.pretrained: there are no pretrained weights of {name}, expected false")
    sizes = {"img_size": image_size} if name.startswith(("vit", "deit", "swin")) else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels, **sizes)
    except OSError as error:  # what huggingface_hub and urllib raise, without a network
        source = timm.get_pretrained_cfg(name)
        raise UserError(
            f"network.pretrained: the weights of {name} ({source.hf_hub_id or source.url}) are neither in the "
            f"Hugging Face cache (HF_HOME) nor to be downloaded: {str(error).splitlines()[0]}"
        ) from None
