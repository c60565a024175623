"""Labelled images in memory or in files, preprocessed once or at every use, in batches."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.files import whole
from pdiff.method.training import shuffled
from pdiff.networks.options import Dataset as Settings
from pdiff.seeds import stream

STORED_BATCH = 64  # images that a worker decodes at a time for the store: some megabytes
MAX_WORKERS = 16

Batch = tuple[Tensor, Tensor]
Key = tuple[Tensor, int | None]  # indices, and the seed of their crops and flips; None: not augmented
ALL = slice(None)


@dataclass(frozen=True)
class Pixels:
    """Raw images in memory: `images` uint8 (n, channels, height, width), `labels` int64 (n,)."""

    images: Tensor
    labels: Tensor

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.images.shape[1]

    def __getitem__(self, k: int) -> Tensor:
        return self.images[k]

    def select(self, rows: Tensor) -> Pixels:
        """The images of some rows, in that order."""
        return Pixels(self.images[rows], self.labels[rows])

    def identify(self, digest: Any) -> None:
        """Feed a hash with all pixels and labels."""
        digest.update(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())


@dataclass(frozen=True)
class Files:
    """Images of any size in files.

    Attributes:
        folder: of all files.
        names: paths below the folder, bytes (n,).
        labels: int64 (n,).
        channels: 3 for colour, 1 for grey.
    """

    folder: Path
    names: np.ndarray
    labels: Tensor
    channels: int = 3

    def path(self, k: int) -> Path:
        """The file of an image."""
        return self.folder / os.fsdecode(self.names[k])

    def __getitem__(self, k: int) -> Tensor:
        """Decode an image, uint8 (channels, height, width).

        Raises:
            UserError: the file is not an image, or is damaged.
        """
        try:
            image = pil_loader(self.path(k))
            return v2.functional.pil_to_tensor(image.convert("L") if self.channels == 1 else image)
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, ..., depending on the format
            raise UserError(f"{self.path(k)}: not a readable image: {' '.join(str(error).split())}") from None

    def select(self, rows: Tensor) -> Files:
        """The images of some rows, in that order."""
        return Files(self.folder, self.names[rows.numpy()], self.labels[rows], self.channels)

    def identify(self, digest: Any) -> None:
        """Feed a hash with names, labels, sizes and times of modification, since files may hold hundreds of GB."""
        folder = os.fsencode(self.folder)
        for name, label in zip(self.names.tolist(), self.labels.tolist(), strict=True):
            stat = os.stat(os.path.join(folder, name))
            digest.update(repr((name, label, stat.st_size, stat.st_mtime_ns)).encode())


class Part:
    """One part of a data set, as batches of preprocessed images.

    Images in files are decoded and resized once, and kept in the folder `store`, unless they are augmented.

    Args:
        raw: images and labels.
        settings: size, channels and normalisation.
        augment: take random resized crops and flips in `stream`.
        store: folder of preprocessed images; None: files are decoded at every use.
    """

    def __init__(
        self, raw: Pixels | Files, settings: Settings, *, augment: bool = False, store: Path | None = None
    ) -> None:
        self.raw, self.settings, self.store = raw, settings, store
        self.size = settings.image_size or raw[0].shape[-1]
        shorter = v2.Resize(settings.resize or self.size, antialias=True)
        self.fit = v2.Compose([shorter, v2.CenterCrop(self.size)])
        random = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        self.crop = v2.Compose(random) if augment else None

    def __len__(self) -> int:
        return len(self.raw.labels)

    @property
    def labels(self) -> Tensor:
        """All labels, (n,)."""
        return self.raw.labels

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, c, h, w) -> float32 (B, channels, h, w); grey is repeated where the settings ask for colour."""
        images = images.expand(-1, self.settings.channels or images.shape[1], -1, -1)
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self.settings.mean, self.settings.std)
        )
        # pooling and convolutions are 2.5 x faster in channels-last layout
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return images.div_(255).sub_(mean).div_(std)

    def batches(self, size: int, device: torch.device | str = "cpu", rows: slice = ALL) -> Iterator[Batch]:
        """All images in order, never augmented: (B, channels, size, size) and labels (B,).

        Args:
            size: images of a batch; the last one may have fewer.
            device: of the batches.
            rows: of each batch, such as `slice(rank, None, processes)`; the others are not even decoded.
        """
        indices = torch.arange(len(self)).split(size)
        return self._batches(((index[rows], None) for index in indices), device, rows)

    def stream(
        self, size: int, *, seed: int, start: int = 0, device: torch.device | str = "cpu", rows: slice = ALL
    ) -> Iterator[Batch]:
        """Endless shuffled training batches from batch `start` on; batch k depends on (seed, k) alone.

        `rows` as in `batches`; crops and flips do not depend on them.
        """
        indices = enumerate(shuffled(len(self), size, seed=seed, start=start), start)
        keys = ((index[rows], stream(seed, k) if self.crop else None) for k, index in indices)
        return self._batches(keys, device, rows, augment=bool(self.crop))

    def _batches(
        self, keys: Iterable[Key], device: torch.device | str, rows: slice, *, augment: bool = False
    ) -> Iterator[Batch]:
        held = None if augment else self._held
        if held is None:
            for images, labels in self._decoded(keys, share=rows.step or 1):
                yield self.normalise(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
            return
        for index, _ in keys:
            images = held.images[index].to(device)
            images = self.fit(images) if held is self.raw else images
            yield self.normalise(images), self.labels[index].to(device)

    def _decoded(self, keys: Iterable[Key], *, share: int = 1) -> Iterator[Batch]:
        """uint8 images (B, c, size, size) and labels of each key, decoded by workers if there are cores for them.

        Args:
            keys: of the batches.
            share: processes that divide the cores among them.
        """
        loader = DataLoader(
            _Decoder(self),
            sampler=keys,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=max(0, min(MAX_WORKERS, ((os.cpu_count() or 1) - 2) // share)),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else it samples from the global one, and a resumed training would differ
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    @cached_property
    def _held(self) -> Pixels | None:
        """All images: raw ones in memory, or preprocessed ones mapped from the store; None: they are in files only."""
        if isinstance(self.raw, Pixels):
            return self.raw
        if self.crop or self.store is None:
            return None
        shape = (len(self), self.raw.channels, self.size, self.size)
        path = self.store / f"{self._digest()}.uint8"
        if not self._stored(path, prod(shape)):
            return None
        images = torch.from_file(str(path), size=prod(shape), dtype=torch.uint8).view(shape)
        return Pixels(images, self.labels)

    def _digest(self) -> str:
        """Digest of everything that the preprocessed images depend on."""
        digest = hashlib.sha256(repr((self.size, self.settings.resize or self.size, self.raw.channels)).encode())
        self.raw.identify(digest)
        return digest.hexdigest()[:32]

    def _stored(self, path: Path, size: int) -> bool:
        """Write all preprocessed images to a file of `size` bytes unless it exists; whether there was room for it.

        One process writes, others wait for it. At most half of the free space is used.
        """

        def complete() -> bool:
            return path.exists() and path.stat().st_size == size

        if complete():
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            for incomplete in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
                incomplete.unlink()
            if not complete():
                if size > shutil.disk_usage(path.parent).free // 2:
                    return False
                self._write(path)
        return True

    def _write(self, path: Path) -> None:
        keys = ((index, None) for index in torch.arange(len(self)).split(STORED_BATCH))
        bar = tqdm(total=len(self), desc="preprocess", unit="image", dynamic_ncols=True, disable=None)
        with whole(path) as temporary, temporary.open("wb") as file, bar:
            for images, _ in self._decoded(keys):
                file.write(images.numpy().data)
                bar.update(len(images))


class TrainingPart(Part):
    """The part that networks are trained on. What decides what a network becomes accepts no other part."""


class _Decoder(torch.utils.data.Dataset):
    """Key -> uint8 images (B, c, size, size) and labels."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __getitem__(self, key: Key) -> Batch | UserError:
        (index, seed), part = key, self.part
        images = torch.empty(len(index), part.raw.channels, part.size, part.size, dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):
            try:
                for row, k in zip(images, index.tolist(), strict=True):
                    row.copy_(self._image(k, seed))
            except UserError as error:  # if it were raised, DataLoader would wrap it in a traceback
                return error
        return images, part.labels[index]

    def _image(self, k: int, seed: int | None) -> Tensor:
        image = self.part.raw[k]
        if seed is None:
            return self.part.fit(image)
        torch.default_generator.manual_seed(seed ^ k)  # torch.manual_seed would seed GPUs, too
        return self.part.crop(image)


@dataclass(frozen=True)
class Images:
    """A data set: training images, a validation part split off them, test images."""

    train: TrainingPart
    validation: Part
    test: Part
    classes: int
    channels: int
    image_size: int

    def digest(self) -> str:
        """Digest of all parts: of every pixel in memory; of names, sizes and times of modification of files."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            part.raw.identify(digest)
        return digest.hexdigest()[:32]
