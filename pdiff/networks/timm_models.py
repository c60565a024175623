"""timm's networks: which names there are, and the networks themselves. timm is imported where a network is made."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from pdiff.method.collection import StateDict

MODEL = re.compile(r"^@register_model\s+def (\w+)\(", re.MULTILINE)
WITH_TAG = re.compile(r"""^\s+["'](\w+\.[\w.-]+)\*?["']\s*:""", re.MULTILINE)  # key of a table of pretrained weights


@lru_cache
def names() -> tuple[str, ...]:
    """Every model of timm's, and those with the tag of pretrained weights that timm's tables list, such as
    resnet18.a1_in1k. Read from timm's source files: importing it takes seconds."""
    folder = Path(find_spec("timm").submodule_search_locations[0]) / "models"
    sources = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    models = dict.fromkeys(name for source in sources for name in MODEL.findall(source))
    tagged = dict.fromkeys(name for source in sources for name in WITH_TAG.findall(source))
    return (*models, *(name for name in tagged if name.partition(".")[0] in models))


def is_known(name: str) -> bool:
    """Whether timm has such a model. The tags of a few models are made by loops in timm's code: there timm is asked."""
    model, dot, _ = name.partition(".")
    if name in names() or not dot or model not in names():
        return name in names()
    if any(other.startswith(f"{model}.") for other in names()):
        return False
    import timm

    return name in timm.list_pretrained()


def create(name: str, *, classes: int, channels: int, image_size: int, **options: Any) -> nn.Module:
    """A network of timm's, made for the size of the images if it needs to know it."""
    import timm

    options |= {"num_classes": classes, "in_chans": channels}
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **options)


def pretrained(name: str, **sizes: int) -> nn.Module:
    """A network with timm's pretrained weights, downloaded if they are not on this machine.

    Raises:
        UserError: there are none, or they cannot be downloaded.
    """
    import timm

    if not timm.is_model_pretrained(name):
        raise UserError(f"network.pretrained: there are no pretrained weights of {name}, expected false or a file")
    try:
        return create(name, pretrained=True, **sizes)
    except OSError as error:  # what huggingface_hub and urllib raise, without a network
        raise UserError(
            f"network.pretrained: {_place(name)}, and cannot be downloaded ({str(error).splitlines()[0]}); "
            f"put it there, or name a file of such weights: network.weights"
        ) from None


def with_weights(name: str, state: StateDict, *, classes: int, **sizes: int) -> nn.Module:
    """A network with given weights, which timm adapts to channels and size of the images.

    Every tensor must fit; where the weights are of another number of classes, the classifier alone remains random.
    """
    import timm

    described = timm.get_pretrained_cfg(name)
    classifier = described.classifier if described else None
    first = classifier if isinstance(classifier, str) or not classifier else classifier[0]
    weight = state.get(f"{first}.weight")
    given = len(weight) if weight is not None else described.num_classes if described else classes
    overlay = {"state_dict": state, "num_classes": given, "label_offset": 0, "custom_load": False}
    loaded = create(name, pretrained=True, pretrained_cfg_overlay=overlay, classes=given, **sizes)
    if given == classes:
        return loaded
    network = create(name, classes=classes, **sizes)
    random = network.state_dict()
    network.load_state_dict(random | {n: t for n, t in loaded.state_dict().items() if random[n].shape == t.shape})
    return network


def _place(name: str) -> str:
    """Which file of pretrained weights is missing from which folder."""
    import timm
    import torch
    from huggingface_hub import constants

    described = timm.get_pretrained_cfg(name)
    if described.hf_hub_id:
        file = f"{described.hf_hub_filename or 'model.safetensors'} of {described.hf_hub_id}"
        return f"{file}, the weights of {name}, is not in {constants.HF_HUB_CACHE} (HF_HOME)"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return f"{os.path.basename(described.url)}, the weights of {name}, is not in {folder} (TORCH_HOME)"
