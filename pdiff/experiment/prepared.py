"""What later stages read of the stage `prepare`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pdiff.errors import UserError
from pdiff.experiment.schema import Experiment
from pdiff.files import read_tensors
from pdiff.method.collection import Collection
from pdiff.networks.architectures import build
from pdiff.networks.images import Images


def fresh_network(experiment: Experiment, images: Images, *, pretrained: bool = False) -> nn.Module:
    """A freshly initialised network for the data set of an experiment."""
    torch.manual_seed(experiment.seed)
    sizes = {"classes": images.classes, "channels": images.channels, "image_size": images.image_size}
    network = experiment.network
    return build(network.architecture, pretrained=pretrained, weights=network.weights, **sizes)


def base_network(experiment: Experiment, images: Images, prepared: Path) -> nn.Module:
    """The base network that `prepare` wrote."""
    network = fresh_network(experiment, images)
    network.load_state_dict(read_tensors(prepared / "network.safetensors"))
    return network


def originals(experiment: Experiment, prepared: Path) -> Collection:
    """The checkpoints that `prepare` wrote, as many of them as the experiment uses.

    Raises:
        UserError: it uses more than there are.
    """
    collection, wanted = Collection.load(prepared / "checkpoints.safetensors"), experiment.generator.checkpoints
    if wanted > len(collection):
        raise UserError(f"generator.checkpoints {wanted}: the collection holds {len(collection)}")
    return collection.select(range(wanted)) if wanted else collection


def spread(collection: Collection, count: int) -> Collection:
    """At most `count` checkpoints, evenly spread over a collection."""
    return collection.select(torch.linspace(0, len(collection) - 1, min(count, len(collection))).long())
