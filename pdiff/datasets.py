"""DATASETS: name -> labelled images, split into train, validation and test."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from pdiff.diffusion import sample_seed
from pdiff.errors import UserError
from pdiff.files import whole
from pdiff.settings import Dataset as Settings
from pdiff.training import shuffled

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer

Batch = tuple[Tensor, Tensor]


class Pixels(NamedTuple):
    """Raw images, uint8 (n, channels, height, width), and labels, int64 (n,)."""

    images: Tensor
    labels: Tensor


class Part:
    """One part of a data set, preprocessed batch by batch on the device that asks.

    Args:
        pixels: raw images and labels.
        settings: size, channels and normalisation.
        augment: draw random resized crops and flips (training only).
    """

    def __init__(self, pixels: Pixels, settings: Settings, *, augment: bool = False) -> None:
        self.pixels, self.settings = pixels, settings
        self.size = settings.image_size or pixels.images.shape[-1]
        self.crop = v2.Compose([v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip()]) if augment else None

    def __len__(self) -> int:
        return len(self.pixels.labels)

    @property
    def labels(self) -> Tensor:
        """All labels, (n,)."""
        return self.pixels.labels

    def preprocess(self, images: Tensor) -> Tensor:
        """Images ready for a network, float32 (B, channels, size, size), of raw ones (B, ...)."""
        resize = self.settings.resize or self.size
        if images.shape[-2:] != (resize, resize):
            images = v2.functional.resize(images, [resize], antialias=True)
        if images.shape[-2:] != (self.size, self.size):
            images = v2.functional.center_crop(images, [self.size])
        return self.normalise(images)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, c, h, w) -> float32 (B, channels, h, w), grey repeated where colour is asked for."""
        channels = self.settings.channels or images.shape[1]
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self.settings.mean, self.settings.std)
        )
        images = ((images.float() / 255 - mean) / std).expand(-1, channels, -1, -1)
        return images.contiguous(memory_format=torch.channels_last)  # pooling and convolutions are 2.5 x faster so

    def batches(self, size: int, device: torch.device | str = "cpu", *, rows: slice = slice(None)) -> Iterator[Batch]:
        """All images in order, (B, channels, size, size) and labels (B,); some rows of each batch."""
        for images, labels in zip(self.pixels.images.split(size), self.labels.split(size), strict=True):
            yield self.preprocess(images[rows].to(device)), labels[rows].to(device)

    def stream(
        self,
        size: int,
        *,
        seed: int,
        start: int = 0,
        device: torch.device | str = "cpu",
        rows: slice = slice(None),
    ) -> Iterator[Batch]:
        """Endless shuffled training batches from batch `start` on, some rows of each; k depends on (seed, k) alone."""
        indices = (index[rows] for index in shuffled(len(self), size, seed=seed, start=start))
        if self.crop is None:
            for index in indices:
                yield self.preprocess(self.pixels.images[index].to(device)), self.labels[index].to(device)
            return
        keys = ([(i, sample_seed(seed, start + k) ^ i) for i in index.tolist()] for k, index in enumerate(indices))
        workers = min(8, (os.cpu_count() or 1) - 2) if (os.cpu_count() or 1) > 2 else 0
        loader = DataLoader(
            _Augmented(self),
            batch_sampler=keys,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw a number from the global one, at the start and at a resume
        )
        for images, labels in loader:
            yield self.normalise(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


class _Augmented(torch.utils.data.Dataset):
    """Augmented images; a key is (index, seed of the crop and the flip)."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.part.crop(self.part.pixels.images[index]), int(self.part.labels[index])


@dataclass(frozen=True)
class Images:
    """A data set: training images, a validation part split off them, test images."""

    train: Part
    validation: Part
    test: Part
    classes: int
    channels: int
    image_size: int

    def digest(self) -> str:
        """A fingerprint of the images and labels of all parts."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(part.pixels.images.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()[:32]


Loader = Callable[[Path, bool], tuple[Pixels, Pixels]]


def digits(root: Path, download: bool) -> tuple[Pixels, Pixels]:
    """The 1 797 digits (8 x 8) of scikit-learn; every third one, shuffled with a fixed seed, is for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    labels = torch.from_numpy(data.target).long()
    return Pixels(images[train], labels[train]), Pixels(images[test], labels[test])


def fashion_mnist(root: Path, download: bool) -> tuple[Pixels, Pixels]:
    """Fashion-MNIST: the files of torchvision, or those of the Debian package dataset-fashion-mnist."""
    from torchvision.datasets import FashionMNIST

    raw = root / "FashionMNIST" / "raw"
    for source in DEBIAN_FASHION_MNIST.glob("*-ubyte.gz"):
        if not (raw / source.stem).exists():
            with whole(raw / source.stem) as target, gzip.open(source) as packed, target.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
    where = f"train-images-idx3-ubyte and its three companions (gunzipped) into {raw}"
    parts = _fetch(
        "fashion_mnist", where, lambda d: [FashionMNIST(root, train=t, download=d) for t in (True, False)], download
    )
    train, test = (Pixels(part.data[:, None], part.targets.long()) for part in parts)
    return train, test


def cifar100(root: Path, download: bool) -> tuple[Pixels, Pixels]:
    """CIFAR-100 in the files of torchvision."""
    from torchvision.datasets import CIFAR100

    where = f"the folder cifar-100-python (with its files train, test and meta) into {root}"
    parts = _fetch("cifar100", where, lambda d: [CIFAR100(root, train=t, download=d) for t in (True, False)], download)
    train, test = (
        Pixels(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return train, test


DATASETS: dict[str, Loader] = {"digits": digits, "fashion_mnist": fashion_mnist, "cifar100": cifar100}


def data_root(settings: Settings) -> Path:
    """Where data sets lie: `dataset.root`, else the variable PDIFF_DATA, else ~/.cache/pdiff/datasets."""
    return Path(settings.root or os.environ.get("PDIFF_DATA") or "~/.cache/pdiff/datasets").expanduser()


def load(settings: Settings) -> Images:
    """Load a data set and split its validation part off.

    Raises:
        UserError: it is not there and cannot be downloaded; it is too small to be split; or the settings ask for
            other colours than it has.
    """
    train, test = DATASETS[settings.name](data_root(settings), settings.download)
    count = len(train.labels)
    held = round(count * settings.validation_fraction)
    if not 0 < held < count:
        raise UserError(
            f"dataset.validation_fraction {settings.validation_fraction} of {count} training images of {settings.name} "
            f"leaves {held} for validation and {count - held} for training, expected at least 1 each"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.split_seed))
    kept, validation = (Pixels(train.images[i], train.labels[i]) for i in (order[held:], order[:held]))
    channels = _channels(settings, train.images.shape[1])
    size = settings.image_size or train.images.shape[-1]
    return Images(
        train=Part(kept, settings, augment=settings.augment),
        validation=Part(validation, settings),
        test=Part(test, settings),
        classes=int(train.labels.max()) + 1,
        channels=channels,
        image_size=size,
    )


def _channels(settings: Settings, own: int) -> int:
    """Channels of the preprocessed images, of raw ones with `own` channels."""
    channels = settings.channels or own
    if own not in (1, channels):
        raise UserError(f"dataset.channels {channels}: {settings.name} has {own}, and only 1 can be repeated")
    for key, values in {"mean": settings.mean, "std": settings.std}.items():
        if len(values) not in (1, channels):
            raise UserError(f"dataset.{key} holds {len(values)} numbers, expected 1 or {channels}: one a channel")
    return channels


def _fetch(name: str, where: str, read: Callable[[bool], list], download: bool) -> list:
    """Read a torchvision data set; download it where it is absent, allowed and reachable."""
    reason = "dataset.download is false"
    try:
        return read(False)
    except Exception as error:  # torchvision: not found, or any error that a damaged file leads to
        reason = f"{reason} ({_line(error)})"
    if download:
        try:
            with _timeout():
                return read(True)
        except Exception as error:
            reason = f"the download failed ({_line(error)})"
    raise UserError(f"dataset {name} is not there, or damaged, and {reason}; put {where}")


def _line(error: Exception) -> str:
    """An error on one line; torchvision's name what was tried on several."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _timeout() -> Iterator[None]:
    """A time limit on sockets that say nothing."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
