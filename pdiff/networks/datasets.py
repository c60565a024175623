"""DATASETS: name -> labelled images, split into train, validation and test."""

from __future__ import annotations

import gzip
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets as tv

from pdiff.errors import UserError
from pdiff.files import whole
from pdiff.networks.download import fetch, line
from pdiff.networks.images import Batch, Files, Images, Part, Pixels
from pdiff.networks.options import Dataset as Settings

__all__ = ["DATASETS", "Batch", "Files", "Images", "Part", "Pixels", "Source", "data_root", "known_sizes", "load"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
TRAIN_TEST = {"train": (True, False)}  # parts as some classes of torchvision name them, and as others do
SPLITS = {"split": ("train", "test")}

Raw = Pixels | Files
Loader = Callable[[Path, bool], tuple[Raw, Raw]]


def digits(root: Path, download: bool) -> tuple[Raw, Raw]:
    """The 1 797 digits (8 x 8) of scikit-learn; every third one, shuffled with a fixed seed, is for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    labels = torch.from_numpy(data.target).long()
    return Pixels(images[train], labels[train]), Pixels(images[test], labels[test])


def mnist(root: Path, download: bool, kind: type[tv.MNIST] = tv.MNIST) -> tuple[Raw, Raw]:
    """MNIST, or what has its format, in gunzipped idx files."""
    files = {f"{kind.__name__}/raw/{Path(name).stem}": "" for name, _ in kind.resources}
    kind = type(kind.__name__, (kind,), {"_check_legacy_exist": lambda self: False})  # old torchvision's pickles
    parts = fetch(kind, root, files, download, **TRAIN_TEST)
    train, test = (_pixels(part.data[:, None], part.targets) for part in parts)
    return train, test


def fashion_mnist(root: Path, download: bool) -> tuple[Raw, Raw]:
    """Fashion-MNIST: the files of torchvision, or those of the Debian package dataset-fashion-mnist."""
    raw = root / "FashionMNIST" / "raw"
    for source in DEBIAN_FASHION_MNIST.glob("*-ubyte.gz"):
        if not (raw / source.stem).exists():
            try:
                with whole(raw / source.stem) as target, gzip.open(source) as packed, target.open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{source}: damaged: {line(error)}; install dataset-fashion-mnist again") from None
    return mnist(root, download, tv.FashionMNIST)


def cifar(root: Path, download: bool, kind: type[tv.CIFAR10]) -> tuple[Raw, Raw]:
    """CIFAR-10 or CIFAR-100 in their Python files: pickles, which are read only with the published MD5 sums."""
    sums = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    files = {f"{kind.base_folder}/{name}": md5 for name, md5 in sums}
    parts = fetch(kind, root, files, download, **TRAIN_TEST)
    train, test = (_pixels(part.data.transpose(0, 3, 1, 2), part.targets) for part in parts)
    return train, test


def svhn(root: Path, download: bool) -> tuple[Raw, Raw]:
    """The cropped digits of SVHN, without the extra ones."""
    files = {name: md5 for _, name, md5 in (tv.SVHN.split_list[split] for split in ("train", "test"))}
    parts = fetch(tv.SVHN, root, files, download, **SPLITS)
    train, test = (_pixels(part.data, part.labels) for part in parts)
    return train, test


def stl10(root: Path, download: bool) -> tuple[Raw, Raw]:
    """The labelled images of STL-10, in its binary files."""
    labelled = tv.STL10.train_list[:2]  # the unlabelled ones are neither needed nor worth a checksum of 2.6 GB
    kind = type("STL10", (tv.STL10,), {"train_list": labelled})
    files = {f"{kind.base_folder}/{name}": md5 for name, md5 in [*labelled, *kind.test_list]}
    parts = fetch(kind, root, files, download, **SPLITS)
    train, test = (_pixels(part.data, part.labels) for part in parts)
    return train, test


def flowers102(root: Path, download: bool) -> tuple[Raw, Raw]:
    """Oxford 102 Flower: the 1 020 images for training, those for testing."""
    sums = dict(tv.Flowers102._file_dict[key] for key in ("label", "setid"))
    files = {"flowers-102/jpg": "", **{f"flowers-102/{name}": md5 for name, md5 in sums.items()}}
    parts = fetch(tv.Flowers102, root, files, download, **SPLITS)
    train, test = (_listed(part._image_files, part._labels, root) for part in parts)
    return train, test


def pets(root: Path, download: bool) -> tuple[Raw, Raw]:
    """The 37 breeds of Oxford-IIIT Pet: trainval for training, test."""
    files = {f"oxford-iiit-pet/{name}": "" for name in ("images", "annotations/trainval.txt", "annotations/test.txt")}
    parts = fetch(tv.OxfordIIITPet, root, files, download, split=("trainval", "test"))
    train, test = (_listed(part._images, part._labels, root) for part in parts)
    return train, test


def food101(root: Path, download: bool) -> tuple[Raw, Raw]:
    """Food-101: train, test."""
    files = {f"food-101/{name}": "" for name in ("images", "meta/train.json", "meta/test.json")}
    parts = fetch(tv.Food101, root, files, download, **SPLITS)
    if parts[0].classes != parts[1].classes:  # or their labels would not mean the same
        raise UserError("food-101/meta/train.json and food-101/meta/test.json must name the same classes")
    train, test = (_listed(part._image_files, part._labels, root) for part in parts)
    return train, test


def imagenet(root: Path, download: bool) -> tuple[Raw, Raw]:
    """ImageNet (ILSVRC 2012) in one folder a class; its validation images are for testing."""
    return _folders(root / "imagenet", ("train", "val"), DATASETS["imagenet"].classes)


def image_folder(root: Path, download: bool) -> tuple[Raw, Raw]:
    """Images of one's own: `root` holds `train` and `test` (or else `val`), each with one folder a class."""
    return _folders(root, ("train", "test" if (root / "test").is_dir() else "val"))


@dataclass(frozen=True)
class Source:
    """Where images come from, and what is known before any is seen.

    Attributes:
        load: (root, download) -> training and test images.
        classes: their number; None: known when the folder is.
        channels: of the raw images.
        image_size: side of the raw images; 0: it varies.
    """

    load: Loader
    classes: int | None
    channels: int
    image_size: int


DATASETS: dict[str, Source] = {
    "digits": Source(digits, 10, 1, 8),
    "fashion_mnist": Source(fashion_mnist, 10, 1, 28),
    "mnist": Source(mnist, 10, 1, 28),
    "svhn": Source(svhn, 10, 3, 32),
    "cifar10": Source(partial(cifar, kind=tv.CIFAR10), 10, 3, 32),
    "cifar100": Source(partial(cifar, kind=tv.CIFAR100), 100, 3, 32),
    "stl10": Source(stl10, 10, 3, 96),
    "flowers102": Source(flowers102, 102, 3, 0),
    "pets": Source(pets, 37, 3, 0),
    "food101": Source(food101, 101, 3, 0),
    "imagenet": Source(imagenet, 1000, 3, 0),
    "image_folder": Source(image_folder, None, 3, 0),
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
    source, root = DATASETS[settings.name], data_root(settings)
    try:
        train, test = (_in_colours(part, settings) for part in source.load(root, settings.download))
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


def _in_colours(part: Raw, settings: Settings) -> Raw:
    """Files are decoded as grey where that is asked for."""
    return replace(part, channels=1) if isinstance(part, Files) and settings.channels == 1 else part


def _check(part: Raw, source: Source, classes: int) -> None:
    """Whether images are as many and as large as they should be, and labels within their range."""
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


def _pixels(images: Any, labels: Any) -> Pixels:
    """Arrays or tensors as torchvision has them."""
    images = torch.from_numpy(np.ascontiguousarray(images))
    return Pixels(images, torch.as_tensor(np.asarray(labels)).long())


def _files(paths: Sequence[Any], labels: Sequence[int], folder: Path) -> Files:
    """Files below a folder as torchvision lists them."""
    names = np.array([os.fsencode(path)[len(os.fsencode(folder)) + 1 :] for path in paths])
    return Files(folder, names, torch.tensor(labels, dtype=torch.int64))


def _listed(paths: Sequence[Path], labels: Sequence[int], root: Path) -> Files:
    """Files that a list names, all of which must be there."""
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"{missing[0]} is missing, and {len(missing) - 1} more of {len(paths)} images that are listed")
    return _files(paths, labels, root)


def _folders(root: Path, parts: tuple[str, str], classes: int | None = None) -> tuple[Raw, Raw]:
    """Folders of images, one a class, the same ones in both parts, as many as `classes` says."""
    try:
        train, test = (tv.ImageFolder(str(root / part)) for part in parts)
    except OSError as error:
        where = " and ".join(str(root / part / "CLASS") for part in parts)
        raise UserError(f"not there: {line(error)}; put images into folders {where}") from None
    if odd := set(train.classes) ^ set(test.classes):
        both = " and ".join(str(root / part) for part in parts)
        raise UserError(f"{both} must hold the same classes, but {min(odd)} (one of {len(odd)}) is in one alone")
    if classes not in (None, len(train.classes)):
        raise UserError(f"{root / parts[0]} holds {len(train.classes)} classes, expected {classes}")
    train, test = (_files([path for path, _ in part.samples], part.targets, root) for part in (train, test))
    return train, test
