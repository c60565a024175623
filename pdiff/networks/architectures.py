"""ARCHITECTURES: name -> network. Any name of timm's is known, too, and any `path/to/file.py:function`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdiff.errors import UserError
from pdiff.method.collection import StateDict
from pdiff.networks import user_code
from pdiff.networks.imported.plain import read_state
from pdiff.networks.small import (
    cnn_medium,
    cnn_small,
    convnet_mini,
    convnext_mini,
    mlp,
    mlp_mini,
    resnet_mini,
    vit_mini,
)

KEY = "network.architecture"
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn_small": cnn_small,
    "cnn_medium": cnn_medium,
    "mlp_mini": mlp_mini,
    "convnet_mini": convnet_mini,
    "resnet_mini": resnet_mini,
    "vit_mini": vit_mini,
    "convnext_mini": convnext_mini,
}


@lru_cache
def known_architectures() -> tuple[str, ...]:
    """Every name that `build` takes, but those of files."""
    import timm

    return (*ARCHITECTURES, *timm.list_models(), *timm.list_pretrained())


def build(name: str, *, pretrained: bool, classes: int, channels: int, image_size: int, weights: str = "") -> nn.Module:
    """A network by name.

    Args:
        name: one of `ARCHITECTURES`, timm's, or `path/to/file.py:function`, where the function takes those of classes,
            channels and image_size that it wants.
        pretrained: with pretrained weights: those of `weights`, or timm's.
        classes: logits.
        channels: of the images.
        image_size: their side.
        weights: a file of pretrained weights, untrusted.

    Raises:
        UserError: the network cannot be made, does not take such images, or gives something else than logits; there
            are no pretrained weights, or they do not fit, or are not on this machine and cannot be downloaded.
    """
    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    own = user_code.is_own(name) or name in ARCHITECTURES
    network = (_own if own else _of_timm)(name, pretrained=pretrained, weights=weights, **sizes)
    try:
        with torch.inference_mode():
            logits = network.eval()(torch.zeros(2, channels, image_size, image_size))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        size = f"{channels} x {image_size} x {image_size}"
        raise UserError(f"{KEY} {name} does not take images of {size}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{KEY} {name}: gives {found} for 2 images, expected logits (2, {classes})")
    return network.train()


def _own(name: str, *, pretrained: bool, weights: str, **sizes: int) -> nn.Module:
    """A network of `ARCHITECTURES`, or of somebody's file."""
    if pretrained and not weights:
        raise UserError(f"network.pretrained: there are no pretrained weights of {name}, expected false or a file")
    network = ARCHITECTURES[name](**sizes) if name in ARCHITECTURES else user_code.call(name, KEY, **sizes)
    if not isinstance(network, nn.Module):
        raise UserError(f"{KEY} {name}: gives a {type(network).__name__}, expected a torch.nn.Module")
    if pretrained:
        state = _read(weights)
        with _fitting(name, weights):
            network.load_state_dict(state)
    return network


def _of_timm(name: str, *, pretrained: bool, weights: str, classes: int, channels: int, image_size: int) -> nn.Module:
    """A network of timm's, with timm's weights where asked for."""
    import timm

    options = {"num_classes": classes, "in_chans": channels}
    if not pretrained:
        return _created(name, image_size, **options)
    if weights:
        return _with_weights(name, weights, image_size, **options)
    if not timm.is_model_pretrained(name):
        raise UserError(f"network.pretrained: there are no pretrained weights of {name}, expected false or a file")
    try:
        return _created(name, image_size, pretrained=True, **options)
    except OSError as error:  # what huggingface_hub and urllib raise, without a network
        raise UserError(
            f"network.pretrained: {_place(name)}, and cannot be downloaded ({str(error).splitlines()[0]}); "
            f"put it there, or name a file of such weights: network.weights"
        ) from None


def _created(name: str, image_size: int, **options: Any) -> nn.Module:
    """A network of timm's, made for the size of the images where it wants to know it."""
    import timm

    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **options)


def _with_weights(name: str, weights: str, image_size: int, **options: int) -> nn.Module:
    """A network of timm's with the weights of a file, which timm adapts to channels and size of the images.

    Every tensor must fit; where the file is of other classes, the classifier alone remains random.
    """
    import timm

    state, described = _read(weights), timm.get_pretrained_cfg(name)
    classifier = described.classifier if described else None
    first = classifier if isinstance(classifier, str) or not classifier else classifier[0]
    of_file = state.get(f"{first}.weight")
    classes = len(of_file) if of_file is not None else described.num_classes if described else options["num_classes"]
    overlay = {"state_dict": state, "num_classes": classes, "label_offset": 0, "custom_load": False}
    with _fitting(name, weights):
        loaded = _created(
            name, image_size, pretrained=True, pretrained_cfg_overlay=overlay, **{**options, "num_classes": classes}
        )
    if classes == options["num_classes"]:
        return loaded
    network = _created(name, image_size, **options)
    own = network.state_dict()
    network.load_state_dict(own | {n: t for n, t in loaded.state_dict().items() if own[n].shape == t.shape})
    return network


def _read(weights: str) -> StateDict:
    """The tensors of a file of weights; nothing else in it is unpickled."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"network.weights: {path} is not a file")
    return read_state(path)


@contextmanager
def _fitting(name: str, weights: str) -> Iterator[None]:
    """Errors while weights are loaded, told on one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        short = f"{reason[:300]}{'...' if len(reason) > 300 else ''}"
        raise UserError(f"network.weights: {weights} does not fit {name}: {short}") from None


def _place(name: str) -> str:
    """Which file of pretrained weights of timm's is not in which folder."""
    import timm
    from huggingface_hub import constants

    described = timm.get_pretrained_cfg(name)
    if described.hf_hub_id:
        file = f"{described.hf_hub_filename or 'model.safetensors'} of {described.hf_hub_id}"
        return f"{file}, the weights of {name}, is not in {constants.HF_HUB_CACHE} (HF_HOME)"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return f"{os.path.basename(described.url)}, the weights of {name}, is not in {folder} (TORCH_HOME)"
