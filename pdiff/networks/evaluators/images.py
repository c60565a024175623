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
from pdiff.networks.evaluators import Evaluation, Evaluations
from pdiff.networks.images import Part
from pdiff.networks.predict import batch_predictions

SAVE_SECONDS = 10.0


@dataclass(frozen=True)
class ImagesEvaluator:
    """Evaluates networks on parts of a data set. The folder holds `<group>.safetensors`: part -> error mask.

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
            UserError: the file of a group holds error masks of another number of networks or images.
        """
        paths = {name: folder / f"{name}.safetensors" for name in groups}
        masks = {name: read_tensors(path) for name, path in paths.items() if path.exists()}
        for name, found in masks.items():
            shapes = {part: tuple(mask.shape) for part, mask in found.items()}
            expected = {part: (len(groups[name]), len(images)) for part, images in self.parts.items()}
            if shapes != expected:
                raise UserError(f"{paths[name]}: error masks are {shapes} (networks, images), expected {expected}")
        if missing := [name for name in groups if name not in masks]:
            found = {part: self._error_masks(part, [groups[name] for name in missing], folder) for part in self.parts}
            for k, name in enumerate(missing):
                masks[name] = {part: rows[k] for part, rows in found.items()}
                write_tensors(paths[name], masks[name])
        return {part: {name: Evaluation.of(masks[name][part]) for name in groups} for part in self.parts}

    def _error_masks(self, part: str, groups: list[Collection], folder: Path) -> list[Tensor]:
        """Error masks (N, images) of groups on a part; the blocks of images that an interrupted run saved are read."""
        images, blocks_folder = self.parts[part], folder / f"{part}_{self.batch_size}_{sum(map(len, groups))}"
        blocks = [read_tensors(path)["wrong"] for path in sorted(blocks_folder.glob("*.safetensors"))]
        done = sum(block.shape[1] for block in blocks)
        options = {"batch_size": self.batch_size, "device": self.device, "label": f"evaluate {part}"}
        pending, saved = [], time.monotonic()
        for rows in batch_predictions(self.network, groups, images, start=done, **options):
            labels = images.labels[done : done + rows[0].shape[1]]
            pending.append(torch.cat(rows) != labels)
            done += len(labels)
            if time.monotonic() - saved > SAVE_SECONDS or done == len(images):
                blocks.append(torch.cat(pending, dim=1))
                write_tensors(blocks_folder / f"{done:09d}.safetensors", {"wrong": blocks[-1]})
                pending, saved = [], time.monotonic()
        return list(torch.cat(blocks, dim=1).split([len(group) for group in groups]))
