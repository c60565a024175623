"""DATASETS: name -> labelled images, split into train, validation and test.

What is known of a data set before it is loaded, its name, classes and sizes, is known without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pdiff.errors import UserError
from pdiff.networks.options import Dataset as Settings

if TYPE_CHECKING:
    from pdiff.networks.images import Files, Images, Pixels

    Raw = Pixels | Files


@dataclass(frozen=True)
class Source:
    """Where images come from, and what is known before any is loaded.

    Attributes:
        load: (root, download) -> training and test images; a function, or its name as `module:function`.
        classes: their number; None: known when the folder is.
        channels: of the raw images.
        image_size: side of the raw images; 0: it varies.
    """

    load: Callable[[Path, bool], tuple[Raw, Raw]] | str
    classes: int | None
    channels: int
    image_size: int


DATASETS: dict[str, Source] = {
    "digits": Source("pdiff.networks.loaders:digits", 10, 1, 8),
    "fashion_mnist": Source("pdiff.networks.loaders:fashion_mnist", 10, 1, 28),
    "mnist": Source("pdiff.networks.loaders:mnist", 10, 1, 28),
    "svhn": Source("pdiff.networks.loaders:svhn", 10, 3, 32),
    "cifar10": Source("pdiff.networks.loaders:cifar10", 10, 3, 32),
    "cifar100": Source("pdiff.networks.loaders:cifar100", 100, 3, 32),
    "stl10": Source("pdiff.networks.loaders:stl10", 10, 3, 96),
    "flowers102": Source("pdiff.networks.loaders:flowers102", 102, 3, 0),
    "pets": Source("pdiff.networks.loaders:pets", 37, 3, 0),
    "food101": Source("pdiff.networks.loaders:food101", 101, 3, 0),
    "imagenet": Source("pdiff.networks.loaders:imagenet", 1000, 3, 0),
    "image_folder": Source("pdiff.networks.loaders:image_folder", None, 3, 0),
}


def known_sizes(settings: Settings) -> dict[str, int]:
    """Classes, channels and image size as the settings and DATASETS tell them; 0 is known when the images are read."""
    source = DATASETS[settings.name]
    return {
        "classes": source.classes or 0,
        "channels": settings.channels or source.channels,
        "image_size": settings.image_size or source.image_size,
    }


def default_root() -> Path:
    """Where data sets lie without `dataset.root`: the variable PDIFF_DATA, else ~/.cache/pdiff/datasets."""
    return Path(os.environ.get("PDIFF_DATA") or "~/.cache/pdiff/datasets").expanduser()


def data_root(settings: Settings) -> Path:
    """Where data sets lie: `dataset.root`, else the default; absolute."""
    return (Path(settings.root).expanduser() if settings.root else default_root()).absolute()


def load(settings: Settings) -> Images:
    """Load a data set and split its validation part off.

    Raises:
        UserError: it is not there and cannot be downloaded; it is damaged; it is too small to be split; or the
            settings ask for colours or a size that it has not.
    """
    import torch

    from pdiff.networks.images import Files, Images, Part

    source, root = DATASETS[settings.name], data_root(settings)
    read = resolve_name(source.load) if isinstance(source.load, str) else source.load
    try:
        train, test = read(root, settings.download)
        if settings.channels == 1 and isinstance(train, Files):  # decoded as grey
            train, test = replace(train, channels=1), replace(test, channels=1)
        classes = source.classes or int(train.labels.max()) + 1
        for part in (train, test):
            _check(part, source, classes)
    except UserError as error:
        raise UserError(f"dataset {settings.name} in {root}: {error}") from None
    held = _held_out(settings, len(train.labels))
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(settings.split_seed))
    size, channels = _size(settings, source), _channels(settings, train.channels)
    store = (root if os.access(root, os.W_OK) else default_root()) / "preprocessed"
    return Images(
        train=Part(train.select(order[held:]), settings, augment=settings.augment, store=store),
        validation=Part(train.select(order[:held]), settings, store=store),
        test=Part(test, settings, store=store),
        classes=classes,
        channels=channels,
        image_size=size,
    )


def folder_state(settings: Settings) -> list[Any]:
    """What `dataset.root` decides where it is the data set: its path, and when its folders were changed."""
    root = data_root(settings).resolve()
    folders = [path for part in ("train", "test", "val") for path in sorted((root / part).glob("*"))]
    return [str(root), *((f"{path.parent.name}/{path.name}", path.stat().st_mtime_ns) for path in folders)]


def _held_out(settings: Settings, count: int) -> int:
    """How many of `count` training images are for validation."""
    held = round(count * settings.validation_fraction)
    if not 0 < held < count:
        raise UserError(
            f"dataset.validation_fraction {settings.validation_fraction} of {count} training images of {settings.name} "
            f"leaves {held} for validation and {count - held} for training, expected at least 1 each"
        )
    return held


def _check(part: Raw, source: Source, classes: int) -> None:
    """Whether images are as many and as large as they should be, and labels within their range."""
    from pdiff.networks.images import Pixels

    labels, size = part.labels, source.image_size
    if not len(labels):
        raise UserError("a part of it holds no images")
    if isinstance(part, Pixels) and part.images.shape != (len(labels), source.channels, size, size):
        expected = (len(labels), source.channels, size, size)
        raise UserError(f"images of shape {tuple(part.images.shape)}, expected {expected} as there are labels")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(f"labels from {low} to {high}, expected 0 to {classes - 1}")


def _size(settings: Settings, source: Source) -> int:
    """Side of the preprocessed images."""
    size = settings.image_size or source.image_size
    if not size:
        raise UserError(f"dataset.image_size 0: images of {settings.name} vary in size, expected a side, such as 224")
    if 0 < settings.resize < size:
        raise UserError(f"dataset.image_size <= dataset.resize must hold, but got ({size}, {settings.resize})")
    return size


def _channels(settings: Settings, own: int) -> int:
    """Channels of the preprocessed images, of raw ones with `own` channels."""
    channels = settings.channels or own
    if own not in (1, channels):
        raise UserError(f"dataset.channels {channels}: {settings.name} has {own}, and only 1 can be repeated")
    for key, values in {"mean": settings.mean, "std": settings.std}.items():
        if len(values) not in (1, channels):
            raise UserError(f"dataset.{key} holds {len(values)} numbers, expected 1 or {channels}: one a channel")
    return channels
