"""Data sets against their own files, torchvision's transforms, and numbered images."""

import gzip
import hashlib
import os
import pickle
import socket
import struct
import urllib.request
from collections import Counter
from itertools import islice
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR100
from torchvision.transforms import v2

from pdiff import datasets
from pdiff.datasets import Part, Pixels
from pdiff.errors import UserError
from pdiff.settings import Dataset

FASHION_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def numbered(count: int, size: int = 4) -> Pixels:
    """Images of which every pixel is the image's number, and so is its label."""
    numbers = torch.arange(count)
    return Pixels(numbers.to(torch.uint8)[:, None, None, None].expand(-1, 1, size, size).clone(), numbers)


def noise(count: int, *shape: int) -> Pixels:
    """Random images."""
    return Pixels(
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)),
        torch.arange(count),
    )


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(autouse=True)
def no_debian_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test writes is there."""
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.delenv("PDIFF_DATA", raising=False)


# -- digits, splits


def test_digits_are_those_of_scikit_learn_each_once():
    images = datasets.load(Dataset(name="digits", validation_fraction=0.2))
    parts = images.train, images.validation, images.test
    assert [len(part) for part in parts] == [958, 240, 599]
    found = Counter((p.pixels.images[i].numpy().tobytes(), int(p.labels[i])) for p in parts for i in range(len(p)))
    source = load_digits()
    scaled = np.rint(source.images * 255 / 16).astype(np.uint8)
    assert found == Counter((i.tobytes(), int(label)) for i, label in zip(scaled, source.target, strict=True))
    assert (images.classes, images.channels, images.image_size) == (10, 1, 8)


def test_digits_are_the_same_every_time_and_the_test_part_whatever_the_split():
    first, again, other = (datasets.load(Dataset(name="digits", split_seed=seed)) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    assert torch.equal(first.test.pixels.images, other.test.pixels.images)
    assert not torch.equal(first.validation.pixels.images, other.validation.pixels.images)


def test_validation_images_are_never_trained_on(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "numbered", lambda root, download: (numbered(50), numbered(7)))
    images = datasets.load(Dataset(name="numbered", validation_fraction=0.2, mean=(0,), std=(1,)))
    validation, train = set(images.validation.labels.tolist()), set(images.train.labels.tolist())
    assert len(validation) == 10
    assert validation | train == set(range(50))
    assert not validation & train
    epochs = [labels for _, labels in islice(images.train.stream(10, seed=3), 8)]
    assert sorted(torch.cat(epochs[:4]).tolist()) == sorted(torch.cat(epochs[4:]).tolist()) == sorted(train)
    for batch, labels in images.train.batches(16):
        assert torch.equal((batch[:, 0, 0, 0] * 255).round().long(), labels)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_split_that_leaves_nothing(monkeypatch, fraction):
    monkeypatch.setitem(datasets.DATASETS, "numbered", lambda root, download: (numbered(20), numbered(7)))
    with pytest.raises(UserError, match=r"validation_fraction 0\.\d+ of 20 training images"):
        datasets.load(Dataset(name="numbered", validation_fraction=fraction))


# -- preprocessing


@pytest.mark.parametrize(
    ("shape", "resize", "size"),
    [((40, 30), 24, 20), ((30, 40), 0, 16), ((32, 32), 0, 32), ((8, 8), 0, 32), ((32, 32), 40, 32)],
)
def test_preprocessing_is_that_of_torchvision(shape, resize, size):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = noise(5, 3, *shape)
    part = Part(pixels, Dataset(name="any", resize=resize, image_size=size, mean=mean, std=std))
    oracle = v2.Compose(
        [v2.Resize(resize or size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    )
    found = torch.cat([batch for batch, _ in part.batches(2)])
    assert found.shape == (5, 3, size, size)
    torch.testing.assert_close(found, torch.stack([oracle(image) for image in pixels.images]))


def test_grey_is_repeated_where_colour_is_asked_for():
    part = Part(noise(2, 1, 4, 4), Dataset(name="any", channels=3, mean=(0, 0.5, 1), std=(1, 2, 4)))
    (batch, _), *_ = part.batches(2)
    grey = part.pixels.images[:, 0].double() / 255
    oracle = torch.stack([grey, (grey - 0.5) / 2, (grey - 1) / 4], dim=1)
    torch.testing.assert_close(batch.double(), oracle, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5, 0.5)}, "dataset.mean holds 2 numbers, expected 1 or 3"),
        ({"std": (0.5, 0.5)}, "dataset.std holds 2 numbers, expected 1 or 3"),
        ({"channels": 1}, "dataset.channels 1: colour has 3"),
    ],
)
def test_colours_that_do_not_fit(monkeypatch, settings, message):
    monkeypatch.setitem(datasets.DATASETS, "colour", lambda root, download: (noise(9, 3, 4, 4), noise(3, 3, 4, 4)))
    with pytest.raises(UserError, match=message):
        datasets.load(Dataset(name="colour", **settings))


# -- training batches


@pytest.mark.parametrize("augment", [False, True])
def test_batch_k_depends_on_seed_and_k_alone(augment):
    part = Part(noise(10, 3, 8, 8), Dataset(name="any"), augment=augment)
    whole = list(islice(part.stream(4, seed=1), 7))
    for start in (1, 3, 6):
        torch.manual_seed(start)
        for found, expected in zip(part.stream(4, seed=1, start=start), whole[start:], strict=False):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    assert not torch.equal(next(part.stream(4, seed=2))[0], whole[0][0])


def test_augmented_images_differ_every_time_and_only_in_training(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "one", lambda root, download: (noise(2, 3, 8, 8), noise(2, 3, 8, 8)))
    images = datasets.load(Dataset(name="one", validation_fraction=0.5, augment=True))
    first, second = (batch for batch, _ in islice(images.train.stream(1, seed=0), 2))
    assert not torch.equal(first, second)
    plain = images.train.preprocess(images.train.pixels.images)
    assert not torch.equal(first, plain)
    assert first.min() >= -1
    assert first.max() <= 1
    assert torch.equal(
        next(images.validation.batches(1))[0], images.validation.preprocess(images.validation.pixels.images)
    )


def test_augmentation_leaves_the_global_generator_alone():
    part = Part(noise(10, 3, 8, 8), Dataset(name="any"), augment=True)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(part.stream(4, seed=1))
    assert torch.equal(torch.rand(3), expected)


def test_workers_draw_the_same_batches(monkeypatch):
    part = Part(noise(10, 3, 8, 8), Dataset(name="any"), augment=True)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    alone = list(islice(part.stream(4, seed=1), 3))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for found, expected in zip(islice(part.stream(4, seed=1), 3), alone, strict=True):
        assert torch.equal(found[0], expected[0])


# -- files


def test_root_and_variable_are_honoured(monkeypatch, tmp_path):
    default = datasets.data_root(Dataset(name="digits"))
    assert default == Path.home() / ".cache" / "pdiff" / "datasets"
    monkeypatch.setenv("PDIFF_DATA", str(tmp_path))
    assert datasets.data_root(Dataset(name="digits")) == tmp_path
    assert datasets.data_root(Dataset(name="digits", root="~/own")) == Path.home() / "own"


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """The files of a tiny CIFAR-100; torchvision is told their checksums."""
    random = np.random.default_rng(0)
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    contents = {
        part: {"data": random.integers(0, 256, (n, 3072), dtype=np.uint8), "fine_labels": list(range(n))}
        for part, n in (("train", 20), ("test", 6))
    }
    for name, content in {**contents, "meta": {"fine_label_names": [str(k) for k in range(20)]}}.items():
        (folder / name).write_bytes(pickle.dumps(content))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    return contents


def test_cifar100_is_read_from_its_files(monkeypatch, tmp_path):
    contents = write_cifar100(tmp_path, monkeypatch)
    for pixels, content in zip(datasets.cifar100(tmp_path, False), contents.values(), strict=True):
        assert pixels.labels.tolist() == content["fine_labels"]
        for k, c, y, x in [(0, 0, 0, 0), (5, 0, 0, 31), (3, 1, 31, 0), (2, 2, 7, 9)]:
            assert pixels.images[k, c, y, x] == content["data"][k, 1024 * c + 32 * y + x]
    images = datasets.load(Dataset(name="cifar100", root=str(tmp_path), download=False))
    assert (images.classes, images.channels, images.image_size, len(images.train)) == (20, 3, 32, 18)


def test_damaged_cifar100(monkeypatch, tmp_path):
    write_cifar100(tmp_path, monkeypatch)
    with (tmp_path / "cifar-100-python" / "train").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"cifar100 is not there, or damaged.*corrupted"):
        datasets.load(Dataset(name="cifar100", root=str(tmp_path), download=False))


def fashion_files() -> dict[str, bytes]:
    """The files of a tiny Fashion-MNIST in the idx format: 12 and 5 images of 28 x 28."""
    random, contents = np.random.default_rng(0), {}
    for part, n in (("train", 12), ("t10k", 5)):
        contents[f"{part}-images-idx3-ubyte"] = struct.pack(">4i", 0x803, n, 28, 28) + random.bytes(n * 784)
        contents[f"{part}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, n) + bytes(k % 10 for k in range(n))
    return contents


def assert_is_fashion(parts: tuple[Pixels, Pixels], contents: dict[str, bytes]) -> None:
    for pixels, part in zip(parts, ("train", "t10k"), strict=True):
        assert pixels.images.numpy().tobytes() == contents[f"{part}-images-idx3-ubyte"][16:]
        assert bytes(pixels.labels.tolist()) == contents[f"{part}-labels-idx1-ubyte"][8:]
        assert pixels.images.shape[1:] == (1, 28, 28)


def test_fashion_mnist_is_read_from_plain_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in fashion_files().items():
        (raw / name).write_bytes(content)
    assert_is_fashion(datasets.fashion_mnist(tmp_path, False), fashion_files())


def test_fashion_mnist_is_read_from_the_debian_package(monkeypatch, tmp_path):
    debian, root = tmp_path / "debian", tmp_path / "root"
    debian.mkdir()
    for name, content in fashion_files().items():
        (debian / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", debian)
    monkeypatch.setenv("PDIFF_DATA", str(root))
    images = datasets.load(Dataset(name="fashion_mnist", download=False, channels=3, image_size=32))
    assert (len(images.train), len(images.validation), len(images.test)) == (11, 1, 5)
    assert next(images.test.batches(5))[0].shape == (5, 3, 32, 32)
    assert sorted(path.name for path in files_below(root)) == sorted(FASHION_FILES)
    assert_is_fashion(datasets.fashion_mnist(root, False), fashion_files())


def test_a_torn_package_leaves_nothing_half_written(monkeypatch, tmp_path):
    debian = tmp_path / "debian"
    debian.mkdir()
    packed = gzip.compress(fashion_files()["train-images-idx3-ubyte"])
    (debian / "train-images-idx3-ubyte.gz").write_bytes(packed[: len(packed) // 2])
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", debian)
    with pytest.raises(EOFError):
        datasets.fashion_mnist(tmp_path / "root", False)
    assert not files_below(tmp_path / "root")


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", fashion_files()["train-images-idx3-ubyte"][:-9]])
def test_damaged_fashion_mnist(tmp_path, content):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FASHION_FILES:
        (raw / name).write_bytes(content)
    with pytest.raises(UserError, match="fashion_mnist is not there, or damaged") as caught:
        datasets.load(Dataset(name="fashion_mnist", root=str(tmp_path), download=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(("name", "file"), [("cifar100", "cifar-100-python"), ("fashion_mnist", FASHION_FILES[0])])
def test_absent_and_not_to_be_had(monkeypatch, tmp_path, name, file, download):
    def unreachable(*args: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    timeout = socket.getdefaulttimeout()
    with pytest.raises(UserError) as caught:
        datasets.load(Dataset(name=name, root=str(tmp_path), download=download))
    message = str(caught.value)
    assert message.startswith(f"dataset {name} is not there")
    assert ("no route to host" if download else "dataset.download is false") in message
    assert file in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert not files_below(tmp_path)
    assert socket.getdefaulttimeout() == timeout
