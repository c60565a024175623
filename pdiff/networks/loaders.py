"""The sources of images, one function each: (folder, whether downloading is allowed) -> training and test images.

`datasets.DATASETS` names them; this module is imported when one of them is loaded, since torchvision takes seconds.
"""

from __future__ import annotations

import gzip
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets as tv

from pdiff.errors import UserError
from pdiff.files import whole
from pdiff.networks.datasets import DATASETS
from pdiff.networks.download import fetch, line
from pdiff.networks.images import Files, Pixels

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
TRAIN_TEST = {"train": (True, False)}  # parts as some classes of torchvision name them, and as others do
SPLITS = {"split": ("train", "test")}

Raw = Pixels | Files


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


def cifar10(root: Path, download: bool, kind: type[tv.CIFAR10] = tv.CIFAR10) -> tuple[Raw, Raw]:
    """CIFAR-10, or what has its format, in Python files: pickles, which are read only with the published MD5 sums."""
    sums = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    files = {f"{kind.base_folder}/{name}": md5 for name, md5 in sums}
    parts = fetch(kind, root, files, download, **TRAIN_TEST)
    train, test = (_pixels(part.data.transpose(0, 3, 1, 2), part.targets) for part in parts)
    return train, test


def cifar100(root: Path, download: bool) -> tuple[Raw, Raw]:
    """CIFAR-100, in the format of CIFAR-10."""
    return cifar10(root, download, tv.CIFAR100)


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
    """The user's images: `root` holds `train` and `test` (or else `val`), each with one folder a class."""
    return _folders(root, ("train", "test" if (root / "test").is_dir() else "val"))


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
