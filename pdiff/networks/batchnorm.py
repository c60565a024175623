"""Statistics of batch normalisation: those of networks that nobody trained are stale until they are measured."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from torch.func import functional_call
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.method.collection import Collection
from pdiff.networks.images import TrainingPart
from pdiff.networks.populations import STATISTICS
from pdiff.parallel import ranks
from pdiff.seeds import stream

BATCH = 250  # images, at most, whose statistics are averaged with those of the other batches


def statistics(collection: Collection, network: nn.Module) -> list[str]:
    """The tensors of a collection that batch normalisation measures, instead of learning them.

    Raises:
        UserError: there is a normalisation layer whose statistics are not in the collection, or none at all.
    """
    layers = [name for name, module in network.named_modules() if getattr(module, "running_mean", None) is not None]
    names = [f"{layer}.{name}" for layer in layers for name in STATISTICS]
    if not layers or (missing := [name for name in names if name not in collection.tensors]):
        what = f"lack {missing[0]}" if layers else "are of a network without batch normalisation"
        raise UserError(f"generate.batchnorm: needs running statistics among the checkpoints, but they {what}")
    return names


def kept(collection: Collection, network: nn.Module) -> Collection:
    """Networks with the running statistics of a base network.

    Raises:
        UserError: as `statistics`.
    """
    state = network.state_dict()
    replaced = {
        name: state[name].expand_as(collection.tensors[name]).clone() for name in statistics(collection, network)
    }
    return Collection(collection.tensors | replaced, collection.names)


def positive(collection: Collection, originals: Collection, *, label: str) -> Collection:
    """Networks whose running variances are at least the smallest that the originals have in the same layer.

    A generator, or noise, can make them negative, and a network with a negative variance computes NaN.

    Args:
        collection: N networks; without running variances they are returned as they are.
        originals: those that they are made of.
        label: what the networks are called in the note that says how many variances were raised.
    """
    raised, count = {}, 0
    for name, tensor in collection.tensors.items():
        if name.endswith("running_var"):
            raised[name] = tensor.clamp(min=originals.tensors[name].min().item())
            count += int((raised[name] != tensor).sum())
    if count:
        tqdm.write(f"note: {label}: {count} running variances were raised to the smallest of the originals")
    return Collection(collection.tensors | raised, collection.names)


@torch.no_grad()
def recomputed(
    collection: Collection,
    network: nn.Module,
    part: TrainingPart,
    *,
    images: int,
    device: torch.device | str = "cpu",
    label: str = "batchnorm",
) -> Collection:
    """Networks with running statistics measured anew: the mean over batches of training images, the same for all.

    Averaged or generated weights have activations of another variance than the networks that they come from; measuring
    it repairs most of the damage (REPAIR: Jordan et al. 2022, arXiv 2211.08403).

    Args:
        collection: N networks with all of their running statistics.
        network: of their architecture; left without momentum in its normalisation.
        part: training images; nothing else may decide what a network becomes.
        images: how many of them, rounded up to whole batches.
        device: where to compute.
        label: of the progress bar.

    Raises:
        TypeError: another part of the data set.
        UserError: as `statistics`.
    """
    if not isinstance(part, TrainingPart):
        raise TypeError(f"statistics are measured on training images alone, expected a TrainingPart, but got {part!r}")
    names = statistics(collection, network)
    size = min(BATCH, images)
    batches = list(islice(part.stream(size, seed=stream(0, "batchnorm"), device=device), -(-images // size)))
    network = network.to(device).eval()
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            module.train().momentum = None  # the cumulative mean
    found = []
    with tqdm(total=len(collection), desc=label, unit="network", dynamic_ncols=True, disable=None) as bar:
        for k in range(len(collection))[ranks.rows()]:
            state = {name: tensor.to(device, copy=True) for name, tensor in collection[k].items()}
            for name in names:
                state[name].fill_(1.0 if name.endswith("running_var") else 0.0)
            for x, _ in batches:
                functional_call(network, state, (x,))
            found.append({name: state[name].cpu() for name in names})
            bar.update()
    empty = {name: collection.tensors[name][:0] for name in names}
    rows = Collection.stack(found).tensors if found else empty
    measured = {name: ranks.gathered(rows[name], len(collection)) for name in names}
    return Collection(collection.tensors | measured, collection.names)
