"""What there is to run: a row a tag, with what is generated, and what the paper's experiments reached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pdiff.errors import UserError
from pdiff.experiment import config, published
from pdiff.experiment.schema import Experiment
from pdiff.files import read_json, write_json
from pdiff.networks import small, user_code
from pdiff.networks.architectures import build
from pdiff.networks.datasets import known_sizes
from pdiff.networks.populations import generated_size

HEADER = ("category", "tag", "data set", "architecture", "generated", "published %")
NONE = "-"


def lines(words: Sequence[str] = ()) -> Iterator[str]:
    """The table of all tags that can be run, line by line; only rows in which every one of some words occurs. What is
    wrong with the files of others comes last."""
    paths, experiments, wrong = config.runnable(), {}, []
    for tag in sorted(paths, key=lambda tag: (paths[tag].parent.name, tag)):
        try:
            experiments[tag] = config.load(tag)
        except UserError as error:  # somebody's own file, most of the time: the others are still there
            wrong.append(f"cannot be loaded: {error}")
    rows = [(paths[tag].parent.name, tag, *_names(experiment)) for tag, experiment in experiments.items()]
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=False)]
    sizes = _Sizes()
    yield _line(HEADER, widths)
    for row in rows:
        if all(word in " ".join(row) for word in words):
            yield _line((*row, _spaced(sizes.of(experiments[row[1]])), _published(row[1])), widths)
    sizes.save()
    yield from wrong


def _names(experiment: Experiment) -> tuple[str, str]:
    """Data set and architecture."""
    if experiment.dataset is None or experiment.network is None:
        return NONE, NONE
    return experiment.dataset.name, experiment.network.architecture


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, the number to the right."""
    names = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False))
    return f"{'  '.join(names)}  {cells[4]:>10}  {cells[5]}"


def _spaced(size: int | None) -> str:
    """A number as it is written in tables."""
    return NONE if size is None else f"{size:,}".replace(",", " ")


def _published(tag: str) -> str:
    """Mean accuracies of original and generated networks."""
    found = published.published(tag)
    means = [found.get(f"test_accuracy/{group}_mean") for group in ("original", "generated")]
    return NONE if None in means else " -> ".join(f"{100 * mean:.2f}" for mean in means)


class _Sizes:
    """How many numbers experiments generate. That needs their networks, so that it is kept in a file of the user's."""

    def __init__(self) -> None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        self.path, self.known, self.new = folder / "pdiff" / "sizes.json", {}, False
        with suppress(UserError):
            content = read_json(self.path)
            self.known = content if isinstance(content, dict) else {}

    def of(self, experiment: Experiment) -> int | None:
        """The size of an experiment; None where it cannot be known without its data."""
        described = _described(experiment)
        if described is None:
            return None
        key = hashlib.sha256(repr(described).encode()).hexdigest()[:32]
        if key not in self.known:
            self.known[key], self.new = _size(*described[:2]), True
        return self.known[key]

    def save(self) -> None:
        """Keep what is new."""
        with suppress(OSError):
            if self.new:
                write_json(self.path, self.known)


def _described(experiment: Experiment) -> tuple[dict[str, Any], tuple[str, ...], Any] | None:
    """Everything that the size depends on: the network, what of it is generated, and the code that makes it."""
    if experiment.dataset is None or experiment.network is None:
        return None
    name, sizes = experiment.network.architecture, known_sizes(experiment.dataset)
    if not all(sizes.values()):
        return None
    code = user_code.source(name) if user_code.is_reference(name) else Path(small.__file__)
    versions = version("timm"), torch.__version__, code.read_bytes() if code.is_file() else b""
    return {"name": name, **sizes}, experiment.prepare.parameters, versions


def _size(network: dict[str, Any], patterns: Sequence[str]) -> int | None:
    """How many numbers of a network are generated; it is built without memory."""
    try:
        with torch.device("meta"):
            return generated_size(build(**network, pretrained=False), patterns)
    except UserError:
        return None
