"""ARCHITECTURES: name -> network. Any name of timm's is known, too, and any `path/to/file.py:function`.

Which names there are is known without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pdiff.errors import UserError
from pdiff.method.options import resolve
from pdiff.networks import timm_models, user_code

if TYPE_CHECKING:
    from torch import nn

    from pdiff.method.collection import StateDict

KEY = "network.architecture"

ARCHITECTURES: dict[str, Callable[..., nn.Module] | str] = {
    "mlp": "pdiff.networks.small:mlp",
    "mlp_deep": "pdiff.networks.small:mlp_deep",
    "cnn_small": "pdiff.networks.small:cnn_small",
    "cnn_medium": "pdiff.networks.small:cnn_medium",
    "mlp_mini": "pdiff.networks.small:mlp_mini",
    "convnet_mini": "pdiff.networks.small:convnet_mini",
    "resnet_mini": "pdiff.networks.small:resnet_mini",
    "resnet8": "pdiff.networks.small:resnet8",
    "vit_mini": "pdiff.networks.small:vit_mini",
    "convnext_mini": "pdiff.networks.small:convnext_mini",
}
"""Name -> function (classes, channels, image_size) that makes the network, or its name as `module:function`."""


def known_architectures() -> tuple[str, ...]:
    """The names that `build` takes, except those of files."""
    return (*ARCHITECTURES, *timm_models.names())


def is_known(name: str) -> bool:
    """Whether `build` takes a name; a file and its function are not looked at."""
    return name in ARCHITECTURES or user_code.is_reference(name) or timm_models.is_known(name)


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
    import torch

    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    ours = name in ARCHITECTURES or user_code.is_reference(name)
    if not pretrained:
        network = (_ours if ours else timm_models.create)(name, **sizes)
    elif weights:
        state = _read(weights)
        with _fitting(name, weights):
            network = (_ours if ours else timm_models.with_weights)(name, state=state, **sizes)
    elif ours:
        raise UserError(f"network.pretrained: there are no pretrained weights of {name}, expected false or a file")
    else:
        network = timm_models.pretrained(name, **sizes)
    try:
        with torch.no_grad():  # not inference_mode: what the network keeps of this call is used in training
            logits = network.eval()(torch.zeros(2, channels, image_size, image_size))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        size = f"{channels} x {image_size} x {image_size}"
        raise UserError(f"{KEY} {name} does not take images of {size}: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{KEY} {name}: gives {found} for 2 images, expected logits (2, {classes})")
    return network.train()


def _ours(name: str, *, state: StateDict | None = None, **sizes: int) -> nn.Module:
    """A network of `ARCHITECTURES` or of the user's file, with the weights `state` if there are some."""
    from torch import nn

    known = name in ARCHITECTURES
    network = resolve(ARCHITECTURES[name])(**sizes) if known else user_code.call(name, KEY, **sizes)
    if not isinstance(network, nn.Module):
        raise UserError(f"{KEY} {name}: gives a {type(network).__name__}, expected a torch.nn.Module")
    if state is not None:
        network.load_state_dict(state)
    return network


def _read(weights: str) -> StateDict:
    """The tensors of a file of weights; nothing else in it is unpickled."""
    from pdiff.networks.imported.template import Template

    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"network.weights: {path} is not a file")
    return Template.read(path).state


@contextmanager
def _fitting(name: str, weights: str) -> Iterator[None]:
    """Any error while weights are loaded becomes one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        short = f"{reason[:300]}{'...' if len(reason) > 300 else ''}"
        raise UserError(f"network.weights: {weights} does not fit {name}: {short}") from None
