"""How good networks are: by their predictions on images, by somebody's function or command, or not known at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pdiff.errors import UserError
from pdiff.files import read_tensors, write_tensors
from pdiff.method.collection import Collection
from pdiff.networks.external import fractions, run_command, run_function
from pdiff.networks.images import Part
from pdiff.networks.imported.plain import Template
from pdiff.networks.predict import batch_predictions

SAVE_SECONDS = 10.0


class Verdict(NamedTuple):
    """What is known of the N networks of a group on one part of the data."""

    accuracy: Tensor  # float64 (N,)
    wrong: Tensor | None = None  # which images each gets wrong, bool (N, images)

    @classmethod
    def of(cls, wrong: Tensor) -> Verdict:
        """The verdict on networks of which it is known what they get wrong."""
        return cls(1 - wrong.double().mean(dim=1), wrong)


Verdicts = dict[str, Verdict]  # of every group
Judge = Callable[[Mapping[str, Collection], Path], dict[str, Verdicts]]
"""(groups, folder) -> part -> group -> verdict. The folder keeps what an interrupted run knew; once a group is judged,
all that is known of it is in a file of its name, and where that is given, the group is not judged again."""


def on_images(
    network: nn.Module, parts: Mapping[str, Part], *, batch_size: int, device: torch.device | str = "cpu"
) -> Judge:
    """Judges networks by what they predict on images: the prefix of a batch is computed once for all groups."""

    def judge(groups: Mapping[str, Collection], folder: Path) -> dict[str, Verdicts]:
        paths = {name: folder / f"{name}.safetensors" for name in groups}
        wrong = {name: read_tensors(path) for name, path in paths.items() if path.exists()}
        for name, found in wrong.items():
            _check(paths[name], found, {part: (len(groups[name]), len(images)) for part, images in parts.items()})
        if todo := {name: group for name, group in groups.items() if name not in wrong}:
            found = {part: judged(part, list(todo.values()), folder) for part in parts}
            wrong |= {name: {part: rows[k] for part, rows in found.items()} for k, name in enumerate(todo)}
        for name in todo:
            write_tensors(paths[name], wrong[name])
        return {part: {name: Verdict.of(wrong[name][part]) for name in groups} for part in parts}

    def judged(part: str, groups: list[Collection], folder: Path) -> list[Tensor]:
        blocks = folder / f"{part}_{batch_size}_{sum(map(len, groups))}"
        options = {"batch_size": batch_size, "device": device, "label": f"evaluate {part}"}
        return _wrong(network, groups, parts[part], blocks, options)

    return judge


def _check(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file of other networks or images."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise UserError(f"{path}: holds verdicts {found} (networks, images), expected {shapes}")


def _wrong(network: nn.Module, groups: list[Collection], part: Part, folder: Path, options: dict) -> list[Tensor]:
    """Which images every network of every group gets wrong; those are read that an interrupted run has done."""
    blocks = [read_tensors(path)["wrong"] for path in sorted(folder.glob("*.safetensors"))]
    done = sum(block.shape[1] for block in blocks)
    pending, saved = [], time.monotonic()
    for rows in batch_predictions(network, groups, part, start=done, **options):
        labels = part.labels[done : done + rows[0].shape[1]]
        pending.append(torch.cat(rows) != labels)
        done += len(labels)
        if time.monotonic() - saved > SAVE_SECONDS or done == len(part):
            blocks.append(torch.cat(pending, dim=1))
            write_tensors(folder / f"{done:09d}.safetensors", {"wrong": blocks[-1]})
            pending, saved = [], time.monotonic()
    return list(torch.cat(blocks, dim=1).split([len(group) for group in groups]))


def by_function(spec: str, template: Template, *, workers: int) -> Judge:
    """Judges networks by what somebody's function predicts with them.

    The judge raises UserError where groups are judged on different labels: they could not be compared.
    """

    def judged(name: str, group: Collection, path: Path) -> dict[str, Tensor]:
        if not path.exists():
            options = {"template": template, "workers": workers, "label": f"evaluate {name}"}
            predicted, labels = run_function(spec, group, **options)
            write_tensors(path, {"wrong": predicted != labels, "labels": labels.long()})
        return read_tensors(path)

    def judge(groups: Mapping[str, Collection], folder: Path) -> dict[str, Verdicts]:
        found = {name: judged(name, group, folder / f"{name}.safetensors") for name, group in groups.items()}
        first, *others = found
        for name in others:
            if not torch.equal(found[name]["labels"], found[first]["labels"]):
                raise UserError(f"evaluate.function {spec}: the labels of {name} are not those of {first}")
        return {"test": {name: Verdict.of(of["wrong"]) for name, of in found.items()}}

    return judge


def by_command(command: str, template: Template, *, folder: Path, pattern: str, workers: int) -> Judge:
    """Judges networks by the accuracy that somebody's command prints for their files; whether numbers up to 1 are
    percentages is told by those of all groups together."""
    options = {"folder": folder, "pattern": pattern, "workers": workers, "template": template}

    def printed(name: str, group: Collection, state: Path) -> list[str]:
        places = {"scratch": state / name, "path": state / f"{name}.jsonl"}
        return run_command(command, group, label=f"evaluate {name}", **places, **options)

    def judge(groups: Mapping[str, Collection], state: Path) -> dict[str, Verdicts]:
        texts = [printed(name, group, state) for name, group in groups.items()]
        accuracies = torch.tensor(fractions(list(chain.from_iterable(texts))), dtype=torch.float64)
        return {"test": dict(zip(groups, map(Verdict, accuracies.split(list(map(len, texts)))), strict=True))}

    return judge


def unknown(groups: Mapping[str, Collection], folder: Path) -> dict[str, Verdicts]:
    """Nobody can tell: no part, no verdict."""
    return {}
