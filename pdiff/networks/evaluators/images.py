"""Evaluation by predictions on images: of all groups together, so that the prefix is computed once per batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pdiff.errors import UserError
from pdiff.files import read_tensors, write_tensors
from pdiff.method.collection import Collection
from pdiff.networks.evaluators import Evaluation, Evaluations, Votes
from pdiff.networks.images import Part
from pdiff.networks.predict import batch_predictions, vote_subsets

BINS = 15  # of confidence, as Guo et al. 2017 and most papers after them
SAVE_SECONDS = 10.0
CLASSES = (torch.uint8, torch.int16)


@dataclass(frozen=True)
class ImagesEvaluator:
    """Evaluates networks on parts of a data set.

    The folder holds `<group>.safetensors`, with three tensors for each part, of N networks and their V votes:
    `<part>.predicted`, the classes (N, images); `<part>.nll`, sums over the images of the negative log probabilities of
    their labels, float64 (N + V,); and `<part>.reliability`, float64 (N + V, bins, 3), see `reliability`.

    Attributes:
        network: the base network, whose generated tensors are replaced by those of each network.
        parts: name -> images.
        batch_size: images at a time.
        device: where to compute.
    """

    network: nn.Module
    parts: Mapping[str, Part]
    batch_size: int
    device: torch.device | str = "cpu"

    def __call__(self, groups: Mapping[str, Collection], folder: Path) -> Evaluations:
        """Evaluate groups of networks; see `Evaluator`.

        Raises:
            UserError: the file of a group is of another form, or of another number of networks or images.
        """
        paths = {name: folder / f"{name}.safetensors" for name in groups}
        known = {name: read_tensors(path) for name, path in paths.items() if path.exists()}
        for name, tensors in known.items():
            self._check(paths[name], tensors, len(groups[name]))
        if missing := {name: group for name, group in groups.items() if name not in known}:
            known |= {name: {} for name in missing}
            for part in self.parts:
                for name, tensors in self._evaluated(part, missing, folder).items():
                    known[name] |= {f"{part}.{what}": tensor for what, tensor in tensors.items()}
            for name in missing:
                write_tensors(paths[name], known[name])
        return {
            part: {
                name: evaluation(
                    *(known[name][f"{part}.{what}"] for what in ("predicted", "nll", "reliability")), images.labels
                )
                for name in groups
            }
            for part, images in self.parts.items()
        }

    def _check(self, path: Path, tensors: Mapping[str, Tensor], count: int) -> None:
        """Raise a UserError unless a file holds what an evaluation of `count` networks finds."""
        rows, expected = count + sum(map(len, vote_subsets(count).values())), {}
        for part, images in self.parts.items():
            expected[f"{part}.predicted"] = f"classes {(count, len(images))}"
            expected[f"{part}.nll"] = f"float64 {(rows,)}"
            expected[f"{part}.reliability"] = f"float64 {(rows, BINS, 3)}"
        forms = {
            name: f"{'classes' if tensor.dtype in CLASSES else str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
            for name, tensor in tensors.items()
        }
        if forms != expected:
            raise UserError(
                f"{path}: holds {_listed(forms)}, expected {_listed(expected)}: it is of other networks or images, or "
                "of another version of pdiff"
            )

    def _evaluated(self, part: str, groups: Mapping[str, Collection], folder: Path) -> dict[str, dict[str, Tensor]]:
        """Predictions, nll and reliability of groups on a part; what an interrupted run saved is read.

        A block of images has a file: its predictions, and the sums over all images up to its end.
        """
        sizes, images = [len(group) for group in groups.values()], self.parts[part]
        rows = [size + sum(map(len, vote_subsets(size).values())) for size in sizes]
        blocks_folder = folder / f"{part}_scores_{self.batch_size}_{sum(sizes)}"
        blocks = [read_tensors(path) for path in sorted(blocks_folder.glob("*.safetensors"))]
        predicted = [block["predicted"] for block in blocks]
        nll = blocks[-1]["nll"] if blocks else torch.zeros(sum(rows), dtype=torch.float64)
        bins = blocks[-1]["reliability"] if blocks else torch.zeros(sum(rows), BINS, 3, dtype=torch.float64)
        done = sum(block.shape[1] for block in predicted)
        options = {"batch_size": self.batch_size, "device": self.device, "label": f"evaluate {part}"}
        pending, saved = [], time.monotonic()
        for found in batch_predictions(self.network, list(groups.values()), images, start=done, **options):
            scores = [scores for group in found for scores in group]  # networks and votes in turn
            pending.append(torch.cat([group.networks.predicted for group in found]))
            labels = images.labels[done : done + pending[-1].shape[1]]
            right = torch.cat([s.predicted for s in scores]) == labels
            nll = nll + torch.cat([s.nll for s in scores]).double().sum(dim=1)
            bins = bins + reliability(torch.cat([s.confidence for s in scores]), right)
            done += len(labels)
            if time.monotonic() - saved > SAVE_SECONDS or done == len(images):
                predicted.append(torch.cat(pending, dim=1))
                block = {"predicted": predicted[-1], "nll": nll, "reliability": bins}
                write_tensors(blocks_folder / f"{done:09d}.safetensors", block)
                pending, saved = [], time.monotonic()
        values = zip(torch.cat(predicted, dim=1).split(sizes), nll.split(rows), bins.split(rows), strict=True)
        names = ("predicted", "nll", "reliability")
        return {name: dict(zip(names, tensors, strict=True)) for name, tensors in zip(groups, values, strict=True)}


def _listed(forms: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {form}" for name, form in sorted(forms.items())) or "nothing"


def reliability(confidence: Tensor, right: Tensor, *, bins: int = BINS) -> Tensor:
    """How often predictions of each confidence are right; adds up over images.

    Args:
        confidence: probabilities of the predicted classes, (K, images).
        right: which predictions are right, bool (K, images).
        bins: of one width; bin b holds confidences in (b / bins, (b + 1) / bins].

    Returns:
        Predictions in each bin, the sum of their confidences, and how many of them are right, float64 (K, bins, 3).
    """
    index = torch.bucketize(confidence, torch.arange(1, bins, dtype=confidence.dtype) / bins)
    index = (index + bins * torch.arange(len(index))[:, None]).flatten()
    sums = [torch.bincount(index, minlength=len(confidence) * bins)]
    for values in (confidence, right):
        sums.append(torch.bincount(index, values.flatten().double(), minlength=len(confidence) * bins))
    return torch.stack([s.double() for s in sums], dim=-1).unflatten(0, (len(confidence), bins))


def calibration_error(sums: Tensor) -> Tensor:
    """Expected calibration error: mean over predictions of |accuracy - mean confidence| of their bin.

    Guo et al. 2017 (arXiv 1706.04599), eq. 3.

    Args:
        sums: of `reliability`, (K, bins, 3).

    Returns:
        In [0, 1], float64 (K,).
    """
    count, confidence, right = sums.unbind(dim=-1)
    return (right - confidence).abs().sum(dim=1) / count.sum(dim=1)


def evaluation(predicted: Tensor, nll: Tensor, sums: Tensor, labels: Tensor) -> Evaluation:
    """The evaluation of N networks that was found on images; of votes, V, where they stand after the networks.

    Args:
        predicted: classes (N, images).
        nll: sums over the images, float64 (N + V,).
        sums: of `reliability`, (N + V, bins, 3).
        labels: (images,).
    """
    count, mean = len(predicted), nll / len(labels)
    right, ece = sums[..., 2].sum(dim=1) / len(labels), calibration_error(sums)
    rows = {1: slice(0, count)}
    for size, subsets in vote_subsets(count).items():
        end = rows[max(rows)].stop
        rows[size] = slice(end, end + len(subsets))
    total, confidence, correct = sums[:count].sum(dim=0).unbind(dim=-1)
    return Evaluation.of(predicted != labels, predicted)._replace(
        nll=mean[:count],
        ece=ece[:count],
        reliability=torch.stack([total, confidence / total, correct / total], dim=-1),
        votes={size: Votes(right[row], mean[row], ece[row]) for size, row in rows.items()},
    )
