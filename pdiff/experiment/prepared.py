"""What several stages share: data set, base network, original networks, and how networks are evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdiff.errors import UserError
from pdiff.experiment import source
from pdiff.experiment.schema import Experiment
from pdiff.files import read_tensors
from pdiff.method.alignment.groups import Groups
from pdiff.method.alignment.reference import Reference
from pdiff.method.alignment.symmetries import permutation_groups
from pdiff.method.collection import Collection
from pdiff.method.training import resolve_device
from pdiff.networks import batchnorm, datasets
from pdiff.networks.architectures import build
from pdiff.networks.evaluators import Context, Evaluator
from pdiff.networks.images import Images
from pdiff.networks.imported.template import Template
from pdiff.parallel.ranks import rank_zero_first
from pdiff.seeds import stream

ALIGNMENT = "alignment.safetensors"
"""What the networks of `prepare` were aligned to, and how each was."""


def load_images(experiment: Experiment) -> Images:
    """The data set of an experiment; rank 0 downloads it."""
    with rank_zero_first():
        return datasets.load(experiment.dataset)


def make_network(experiment: Experiment, images: Images, *, pretrained: bool = False) -> nn.Module:
    """A freshly initialised network for the data set of an experiment, the same at every call."""
    torch.manual_seed(experiment.seed)
    return new_network(experiment, images, pretrained=pretrained)


def new_network(experiment: Experiment, images: Images, *, pretrained: bool = False) -> nn.Module:
    """A freshly initialised network for the data set of an experiment, another one at every call."""
    sizes = {"classes": images.classes, "channels": images.channels, "image_size": images.image_size}
    network = experiment.network
    return build(network.architecture, pretrained=pretrained, weights=network.weights, **sizes)


def base_network(experiment: Experiment, images: Images, folder: Path) -> nn.Module:
    """The network in `network.safetensors`, which `pretrain` and `prepare` write."""
    network = make_network(experiment, images)
    network.load_state_dict(read_tensors(folder / "network.safetensors"))
    return network


def original_networks(experiment: Experiment, prepared: Path) -> Collection:
    """The checkpoints that generators are fitted on: those that `prepare` did not hold out, as many as are used.

    Raises:
        UserError: the experiment uses more than the whole collection.
    """
    collection, wanted = Collection.load(prepared / "checkpoints.safetensors"), experiment.generator.checkpoints
    if wanted > len(collection) and wanted > (whole := len(collection) + len(heldout_networks(prepared) or ())):
        raise UserError(f"generator.checkpoints {wanted}: the collection holds {whole}")
    return collection.select(slice(wanted)) if wanted else collection


def unit_groups(experiment: Experiment, prepared: Path) -> Groups:
    """Which units of the network of an experiment are interchangeable; see `permutation_groups`."""
    images = load_images(experiment)
    example = torch.zeros(1, images.channels, images.image_size, images.image_size)
    return permutation_groups(base_network(experiment, images, prepared), example)


def with_statistics(
    experiment: Experiment, prepared: Path, networks: Collection, label: str, *, originals: Collection | None = None
) -> Collection:
    """Networks that nobody trained, with the running statistics that `generate.batchnorm` asks for.

    In an audit, where that section is without effect, they keep those that they have, with positive variances.

    Args:
        experiment: what is asked for.
        prepared: folder of the base network and of the originals.
        networks: generated ones, or a null arm.
        label: what they are called.
        originals: those that generators are fitted on; read where they are needed, if absent.

    Raises:
        UserError: the running statistics are not among the checkpoints.
    """
    how = "generate" if experiment.audit else experiment.generate.batchnorm
    if how == "generate":
        if not any(name.endswith("running_var") for name in networks.tensors):
            return networks
        return batchnorm.positive(networks, originals or original_networks(experiment, prepared), label=label)
    images = load_images(experiment)
    network = base_network(experiment, images, prepared)
    if how == "keep":
        return batchnorm.kept(networks, network)
    options = {"images": experiment.generate.recompute_images, "device": resolve_device(experiment.device)}
    return batchnorm.recomputed(networks, network, images.train, label=label, **options)


def reference(experiment: Experiment, prepared: Path) -> Reference | None:
    """What networks are aligned to before they are compared; None where the population is not aligned."""
    path = prepared / ALIGNMENT
    if not path.exists():
        return None
    return Reference.load(path, unit_groups(experiment, prepared), **alignment_options(experiment))[0]


def alignment_options(experiment: Experiment) -> dict[str, Any]:
    """How networks are aligned."""
    return {"balance": experiment.prepare.balance, "seed": stream(experiment.seed, "align")}


def heldout_networks(prepared: Path) -> Collection | None:
    """The checkpoints that `prepare` held out, if any."""
    path = prepared / "heldout.safetensors"
    return Collection.load(path) if path.exists() else None


def evenly_spaced(collection: Collection, count: int) -> Collection:
    """At most `count` checkpoints, evenly spread over a collection."""
    return collection.select(torch.linspace(0, len(collection) - 1, min(count, len(collection))).long())


def evaluator(experiment: Experiment, prepared: Path) -> Evaluator:
    """The evaluator of an experiment, with what it needs of the stage `prepare`."""
    context = Context(
        network=lambda: base_network(experiment, load_images(experiment), prepared),
        images=lambda: load_images(experiment),
        template=lambda: _template(experiment, prepared),
        device=resolve_device(experiment.device),
    )
    return experiment.evaluator.make(context)


def _template(experiment: Experiment, prepared: Path) -> Template:
    """How files of the networks are laid out: as those of `prepare.source`, or plainly, with all tensors."""
    if experiment.prepare.source:
        return source.checkpoints(experiment.prepare)[0].read()
    return Template.of(read_tensors(prepared / "network.safetensors"))
