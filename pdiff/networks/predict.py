"""Predictions of every network of a collection: the frozen prefix once per batch, then all suffixes together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from pdiff.method.collection import Collection, StateDict
from pdiff.networks.images import Part
from pdiff.networks.split import shrink, split
from pdiff.parallel import ranks

CHUNK_BYTES = 8 << 20  # activations of the suffixes that are computed together: they fit in a cache


def predictions(network: nn.Module, collection: Collection, images: Part, **options: Any) -> Tensor:
    """Classes that every network of a collection predicts, uint8 or int16 (N, images); options as below."""
    return torch.cat([rows for (rows,) in batch_predictions(network, [collection], images, **options)], dim=1)


@torch.inference_mode()
def batch_predictions(
    network: nn.Module,
    collections: Sequence[Collection],
    images: Part,
    *,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
    label: str = "evaluate",
    start: int = 0,
) -> Iterator[list[Tensor]]:
    """Classes that every network of several collections predicts, batch by batch.

    Args:
        network: the base network; its generated tensors are replaced by each checkpoint's.
        collections: of one layout.
        images: what to predict on.
        batch_size: images at a time.
        device: where to compute.
        label: of the progress bar.
        start: first image; rounded up to a multiple of the batch size.

    Yields:
        For every collection its predictions on a batch, uint8 or int16 (N, B), on the CPU.
    """
    network = network.to(device).eval()
    prefix, suffix = split(network, collections[0].tensors.keys())
    base, used = network.state_dict(), suffix.state_dict().keys()  # a network may have tensors that it does not use
    shares = [_Share(c) for c in collections]
    groups = [{n: t.to(device, base[n].dtype) for n, t in s.part.tensors.items() if n in used} for s in shares]
    run = _together if _cheap_together(collections[0]) else _in_turn
    networks = sum(len(share.part) for share in shares)
    total, done = networks * len(images), networks * start
    shrunk = None
    with tqdm(total=total, initial=done, desc=label, unit="prediction", unit_scale=True, disable=None) as bar:
        for batch, _ in islice(images.batches(batch_size, device), -(-start // batch_size), None):
            activations = prefix(batch)
            shrunk = shrunk or shrink(suffix, activations, groups[0].keys())
            yield [
                share.gathered(torch.cat(list(run(shrunk, states, activations, len(share.part), bar.update))).cpu())
                for states, share in zip(groups, shares, strict=True)
            ]


class _Share:
    """The part of a collection that this process computes: all of it where there are fewer networks than processes."""

    def __init__(self, collection: Collection) -> None:
        self.count, self.split = len(collection), len(collection) >= ranks.world()
        self.part = collection.select(ranks.rows()) if self.split else collection

    def gathered(self, predicted: Tensor) -> Tensor:
        """The predictions of all networks, from those that each process computed."""
        return ranks.gathered(predicted, self.count) if self.split else predicted


def _cheap_together(collection: Collection) -> bool:
    """Whether to vectorise over networks: not where convolution kernels are generated, since many small grouped
    convolutions are slower than one network after the other (3 x on a CPU, measured on cnn_medium)."""
    return all(tensor.ndim <= 3 for tensor in collection.tensors.values())


def _in_turn(suffix: nn.Module, states: StateDict, inputs: tuple, count: int, done: Callable) -> Iterator[Tensor]:
    for k in range(count):
        outputs = functional_call(suffix, {name: tensor[k] for name, tensor in states.items()}, inputs)
        done(len(outputs))
        yield _classes(outputs)[None]


def _together(suffix: nn.Module, states: StateDict, inputs: tuple, count: int, done: Callable) -> Iterator[Tensor]:
    vectorised = vmap(lambda state: functional_call(suffix, state, inputs))
    size = sum(value.numel() * value.element_size() for value in inputs if isinstance(value, Tensor))
    chunk = max(1, CHUNK_BYTES // max(1, size))
    for start in range(0, count, chunk):
        outputs = vectorised({name: tensor[start : start + chunk] for name, tensor in states.items()})
        done(outputs.shape[0] * outputs.shape[1])
        yield _classes(outputs)


def _classes(outputs: Tensor) -> Tensor:
    """Predicted classes of logits (..., classes), uint8 or int16; NaN does not raise."""
    return outputs.argmax(dim=-1).to(torch.uint8 if outputs.shape[-1] <= 256 else torch.int16)


def accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of predictions (N, images) against labels (images,), float64 (N,)."""
    return (predicted == labels).double().mean(dim=1)


def network_accuracy(network: nn.Module, images: Part, *, batch_size: int, device: torch.device | str) -> float:
    """Accuracy of one network in evaluation mode; afterwards it is in the mode that it was in."""
    mode = network.training
    network.eval()
    right = 0
    with torch.no_grad():  # not inference_mode: the network may keep what it computes, and is trained later
        for batch, labels in images.batches(batch_size, device, rows=ranks.rows()):
            if len(labels):
                right += int((network(batch).argmax(dim=-1) == labels).sum())
    network.train(mode)
    return ranks.summed(right) / len(images)
