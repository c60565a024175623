"""Predictions of every network of a collection: the frozen prefix once per batch, then all suffixes together.

Beside the networks, soft votes are measured: the mean of the softmax probabilities of a random subset of the networks
(deep ensembles: Lakshminarayanan et al. 2017, arXiv 1612.01474).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, islice
from math import comb, inf, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from pdiff.method.collection import Collection, StateDict
from pdiff.networks.evaluators import VOTE_SIZES
from pdiff.networks.images import Part
from pdiff.networks.split import shrink, split
from pdiff.parallel import ranks
from pdiff.seeds import stream

CHUNK_BYTES = 8 << 20  # activations of the suffixes that are computed together: they fit in a cache
VOTE_SUBSETS = 8  # votes of each size


class Scores(NamedTuple):
    """What K classifiers, networks or votes, say of B images with known labels.

    Where the softmax of a network is undefined, since a logit is NaN or +inf, the network is wrong: its class is the
    one after the label, `nll` is inf and `confidence` 1.

    Attributes:
        predicted: most probable classes, uint8 or int16 (K, B).
        nll: negative log probabilities of the labels in nats, float32 (K, B); inf where there is no such class.
        confidence: probabilities of the predicted classes, float32 (K, B).
    """

    predicted: Tensor
    nll: Tensor
    confidence: Tensor


class Predicted(NamedTuple):
    """What the N networks of a collection and their V votes (`vote_subsets`) say of a batch of B images."""

    networks: Scores
    votes: Scores


def vote_subsets(count: int) -> dict[int, Tensor]:
    """The subsets of `count` networks that vote: size m -> indices (R, m), for the sizes above 1 that there are.

    They are random, without replacement, and depend on `count` alone; all of them where there are at most VOTE_SUBSETS.
    """
    generator = torch.Generator().manual_seed(stream(0, "votes"))
    found = {}
    for size in (m for m in VOTE_SIZES if 1 < m <= count):
        if comb(count, size) <= VOTE_SUBSETS:
            found[size] = torch.tensor(list(combinations(range(count), size)))
        else:
            found[size] = torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(VOTE_SUBSETS)])
    return found


def predictions(network: nn.Module, collection: Collection, images: Part, **options: Any) -> Tensor:
    """Classes that every network of a collection predicts, uint8 or int16 (N, images); options as below."""
    batches = batch_predictions(network, [collection], images, votes=False, **options)
    return torch.cat([found.networks.predicted for (found,) in batches], dim=1)


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
    votes: bool = True,
) -> Iterator[list[Predicted]]:
    """Scores of every network of several collections, and of their votes, batch by batch.

    Args:
        network: the base network; its generated tensors are replaced by each checkpoint's.
        collections: of one layout.
        images: what to predict on.
        batch_size: images at a time.
        device: where to compute.
        label: of the progress bar.
        start: first image; rounded up to a multiple of the batch size.
        votes: whether networks vote; without, there are no votes (0, B).

    Yields:
        For every collection its scores on a batch, on the CPU.
    """
    network = network.to(device).eval()
    prefix, suffix = split(network, collections[0].tensors.keys())
    base, used = network.state_dict(), suffix.state_dict().keys()  # a network may have tensors that it does not use
    shares = [_Share(c, votes=votes) for c in collections]
    groups = [{n: t.to(device, base[n].dtype) for n, t in s.part.tensors.items() if n in used} for s in shares]
    networks = sum(len(share.part) for share in shares)
    total, done = networks * len(images), networks * start
    shrunk = None
    with tqdm(total=total, initial=done, desc=label, unit="prediction", unit_scale=True, disable=None) as bar:
        for batch, labels in islice(images.batches(batch_size, device), -(-start // batch_size), None):
            activations = prefix(batch)
            shrunk = shrunk or shrink(suffix, activations, groups[0].keys())
            yield [
                share.scores(logits(shrunk, states, activations, len(share.part), bar.update), labels)
                for states, share in zip(groups, shares, strict=True)
            ]


class _Share:
    """The part of a collection that this process computes: all of it where there are fewer networks than processes."""

    def __init__(self, collection: Collection, *, votes: bool) -> None:
        self.count, self.split = len(collection), len(collection) >= ranks.world()
        self.part = collection.select(ranks.rows()) if self.split else collection
        self.subsets = list(vote_subsets(self.count).values()) if votes else []
        weights = torch.zeros(sum(map(len, self.subsets)), self.count)
        for row, members in zip(weights, (m for subsets in self.subsets for m in subsets), strict=True):
            row[members] = 1 / len(members)
        self.weights = weights[:, ranks.rows()] if self.split else weights  # votes = weights @ probabilities

    def scores(self, outputs: Iterable[Tensor], labels: Tensor) -> Predicted:
        """The scores of all networks, those of other processes among them, and of their votes.

        Args:
            outputs: logits (k, B, classes) of k networks of this process at a time, in order.
            labels: of the images, (B,).
        """
        chunks: list[Scores] = []
        done, votes = 0, None
        for logits in outputs:
            scores, probabilities = _softmax_scores(logits, labels)
            chunks.append(scores)
            if self.subsets:
                rows = probabilities.flatten(1)
                votes = rows.new_zeros(len(self.weights), rows.shape[1]) if votes is None else votes
                _add_product(votes, self.weights[:, done : done + len(logits)], rows)
            done += len(logits)
        networks = Scores(*(self._gathered(torch.cat(parts).cpu()) for parts in zip(*chunks, strict=True)))
        if votes is None:
            return Predicted(networks, Scores(*(values[:0] for values in networks)))
        votes = ranks.summed_tensor(votes) if self.split else votes
        return Predicted(networks, self._vote_scores(votes.unflatten(1, (len(labels), -1)), networks.nll, labels.cpu()))

    def _gathered(self, part: Tensor) -> Tensor:
        return ranks.gathered(part, self.count) if self.split else part

    def _vote_scores(self, probabilities: Tensor, nll: Tensor, labels: Tensor) -> Scores:
        """Scores of votes with probabilities (V, B, classes), of networks with negative log probabilities (N, B).

        The probability of a label is averaged from the latter, since in float32 it may be too small for a number.
        """
        confidence, predicted = (values.cpu() for values in probabilities.max(dim=-1))
        logs = [torch.logsumexp(-nll[members], dim=1) - log(members.shape[1]) for members in self.subsets]
        return _scores(predicted, -torch.cat(logs), confidence, labels, classes=probabilities.shape[-1])


def _add_product(total: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Add weights (V, k) @ rows (k, n) to a total (V, n); of few rows most weights are zero, and left out."""
    some = weights.any(dim=1).nonzero()[:, 0]
    if len(some) == len(total):
        total.addmm_(weights.to(total.device), rows)
    else:
        total.index_add_(0, some.to(total.device), weights[some].to(total.device) @ rows)


def _softmax_scores(logits: Tensor, labels: Tensor) -> tuple[Scores, Tensor]:
    """Scores of networks with logits (K, B, classes); and their softmax in float32, 0 where it is undefined."""
    classes = logits.shape[-1]
    largest, predicted = logits.max(dim=-1)
    exponentials = (logits - largest[..., None]).float().exp_()
    total = exponentials.sum(dim=-1)
    of_labels = logits[:, torch.arange(len(labels), device=logits.device), labels.clamp(max=classes - 1)]
    nll = ((largest - of_labels).float() + total.log()).masked_fill_(labels >= classes, inf)
    confidence = total.reciprocal_().nan_to_num_(0.0)
    probabilities = exponentials.mul_(confidence[..., None]).nan_to_num_(0.0)
    return _scores(predicted, nll, confidence, labels, classes=classes), probabilities


def _scores(predicted: Tensor, nll: Tensor, confidence: Tensor, labels: Tensor, *, classes: int) -> Scores:
    """Scores (K, B) where a confidence of 0 says that probabilities are undefined."""
    undefined = confidence == 0
    predicted = torch.where(undefined, (labels + 1) % classes, predicted)
    return Scores(
        predicted.to(torch.uint8 if classes <= 256 else torch.int16),
        nll.masked_fill(undefined, inf),
        confidence.masked_fill(undefined, 1.0),
    )


def logits(suffix: nn.Module, states: StateDict, inputs: tuple, count: int, done: Callable) -> Iterator[Tensor]:
    """Logits (k, B, classes) of a few of `count` networks at a time, in order.

    Networks are vectorised, but not over convolution kernels: many small grouped convolutions are slower than one
    network after the other (3 x on a CPU, measured on cnn_medium).

    Args:
        suffix: of their architecture.
        states: their tensors, (count, *shape) each.
        inputs: of the suffix.
        count: how many.
        done: called with the number of predictions whenever there are new ones.
    """
    run = _together if all(tensor.ndim <= 3 for tensor in states.values()) else _in_turn
    return run(suffix, states, inputs, count, done)


def _in_turn(suffix: nn.Module, states: StateDict, inputs: tuple, count: int, done: Callable) -> Iterator[Tensor]:
    """Logits (1, B, classes) of one network after the other."""
    for k in range(count):
        outputs = functional_call(suffix, {name: tensor[k] for name, tensor in states.items()}, inputs)
        done(len(outputs))
        yield outputs[None]


def _together(suffix: nn.Module, states: StateDict, inputs: tuple, count: int, done: Callable) -> Iterator[Tensor]:
    """Logits (k, B, classes) of as many networks at a time as fit in CHUNK_BYTES."""
    vectorised = vmap(lambda state: functional_call(suffix, state, inputs))
    size = sum(value.numel() * value.element_size() for value in inputs if isinstance(value, Tensor))
    chunk = max(1, CHUNK_BYTES // max(1, size))
    for start in range(0, count, chunk):
        outputs = vectorised({name: tensor[start : start + chunk] for name, tensor in states.items()})
        done(outputs.shape[0] * outputs.shape[1])
        yield outputs


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
