"""DATASETS: name -> labelled images, split into train, validation and test.

What is known of a data set before it is loaded, its name, classes and sizes, is known without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff.errors import UserError
from pdiff.method.options import resolve
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
        files: patterns, below the root, of the files that are read; for images in files, of lists and folders.
    """

    load: Callable[[Path, bool], tuple[Raw, Raw]] | str
    classes: int | None
    channels: int
    image_size: int
    files: tuple[str, ...] = ()


DATASETS: dict[str, Source] = {
    "digits": Source("pdiff.networks.loaders:digits", 10, 1, 8),
    "fashion_mnist": Source("pdiff.networks.loaders:fashion_mnist", 10, 1, 28, ("FashionMNIST/raw/*",)),
    "mnist": Source("pdiff.networks.loaders:mnist", 10, 1, 28, ("MNIST/raw/*",)),
    "svhn": Source("pdiff.networks.loaders:svhn", 10, 3, 32, ("*_32x32.mat",)),
    "cifar10": Source("pdiff.networks.loaders:cifar10", 10, 3, 32, ("cifar-10-batches-py/*",)),
    "cifar100": Source("pdiff.networks.loaders:cifar100", 100, 3, 32, ("cifar-100-python/*",)),
    "stl10": Source("pdiff.networks.loaders:stl10", 10, 3, 96, ("stl10_binary/*",)),
    "flowers102": Source("pdiff.networks.loaders:flowers102", 102, 3, 0, ("flowers-102/*",)),
    "pets": Source(
        "pdiff.networks.loaders:pets", 37, 3, 0, ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations/*")
    ),
    "food101": Source("pdiff.networks.loaders:food101", 101, 3, 0, ("food-101/images/*", "food-101/meta/*")),
    "imagenet": Source("pdiff.networks.loaders:imagenet", 1000, 3, 0, ("imagenet/*/*",)),
    "image_folder": Source("pdiff.networks.loaders:image_folder", None, 3, 0, ("train/*", "test/*", "val/*")),
}


def known_sizes(settings: Settings) -> dict[str, int]:
    """Classes, channels and image size as far as the settings and DATASETS determine them; otherwise 0."""
    source = DATASETS[settings.name]
    return {
        "classes": source.classes or 0,
        "channels": settings.channels or source.channels,
        "image_size": settings.image_size or source.image_size,
    }


def default_root() -> Path:
    """The folder of data sets without `dataset.root`: the variable PDIFF_DATA, else ~/.cache/pdiff/datasets."""
    return Path(os.environ.get("PDIFF_DATA") or "~/.cache/pdiff/datasets").expanduser()


def data_root(settings: Settings) -> Path:
    """The folder of data sets: `dataset.root`, else the default; absolute."""
    return (Path(settings.root).expanduser() if settings.root else default_root()).absolute()


def files_state(settings: Settings) -> tuple[Any, ...]:
    """The root of a data set, and the time of the last change of each of its files and folders (`Source.files`).

    An image that is overwritten in place does not change its folder, and is not noticed here.
    """
    root = data_root(settings).resolve()
    paths = [path for pattern in DATASETS[settings.name].files for path in sorted(root.glob(pattern))]
    return (
        str(root),
        *((path.relative_to(root).as_posix(), path.stat().st_mtime_ns) for path in paths if path.exists()),
    )


def load(settings: Settings) -> Images:
    """As `read`, but the last data set is kept, and returned again while its settings and files are the same."""
    return _load(settings, DATASETS[settings.name], files_state(settings))


@lru_cache(maxsize=1)
def _load(settings: Settings, source: Source, state: tuple[Any, ...]) -> Images:
    return read(settings)


def read(settings: Settings) -> Images:
    """Read a data set, downloaded if necessary, and split its validation part off.

    Raises:
        UserError: it is absent and cannot be downloaded, is damaged or too small to be split, or the settings ask for
            colours or a size that it does not have.
    """
    import torch

    from pdiff.networks.images import Files, Images, Part, TrainingPart

    source, root = DATASETS[settings.name], data_root(settings)
    try:
        train, test = resolve(source.load)(root, settings.download)
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
        train=TrainingPart(train.select(order[held:]), settings, augment=settings.augment, store=store),
        validation=Part(train.select(order[:held]), settings, store=store),
        test=Part(test, settings, store=store),
        classes=classes,
        channels=channels,
        image_size=size,
    )


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
    """Raise UserError unless there are images, as many as labels, of the expected size, and labels in their range."""
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


def _channels(settings: Settings, raw: int) -> int:
    """Channels of the preprocessed images, from those of the raw ones."""
    channels = settings.channels or raw
    if raw not in (1, channels):
        raise UserError(f"dataset.channels {channels}: {settings.name} has {raw}, and only 1 can be repeated")
    for key, values in {"mean": settings.mean, "std": settings.std}.items():
        if len(values) not in (1, channels):
            raise UserError(f"dataset.{key} holds {len(values)} numbers, expected 1 or {channels}: one a channel")
    return channels
