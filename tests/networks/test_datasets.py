"""Data sets against small files in their true formats, written here."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import socket
import struct
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets as tv
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits

from pdiff.cli.main import main
from pdiff.errors import UserError
from pdiff.experiment import schema, stages
from pdiff.networks import datasets, loaders
from pdiff.networks.datasets import DATASETS, Source
from pdiff.networks.images import Images, Part, Pixels
from pdiff.networks.options import Dataset, Network

TRAIN, TEST = 20, 6  # images that are written here
FASHION_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
IN_FILES = ["flowers102", "pets", "food101", "imagenet", "image_folder"]
IN_MEMORY = [name for name in DATASETS if name not in IN_FILES]

Known = list[tuple[np.ndarray, int]]  # images as they were written, (c, h, w), or colours, (3,), and their labels


@pytest.fixture(autouse=True)
def no_debian_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test writes is there."""
    monkeypatch.setattr(loaders, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.delenv("PDIFF_DATA", raising=False)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


# -- writers: (root, random, monkeypatch) -> what the training and the test part hold


def random_parts(random: np.random.Generator, classes: int, *shape: int) -> tuple[Known, Known]:
    """Random images of a training and a test part; every label that has room occurs."""
    images = random.integers(0, 256, (TRAIN + TEST, *shape), dtype=np.uint8)
    labels = [k % classes for k in range(TRAIN + TEST)]
    both = list(zip(images, labels, strict=True))
    return both[:TRAIN], both[TRAIN:]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: type) -> tuple:
    folder, fine = root / kind.base_folder, kind is tv.CIFAR100
    folder.mkdir(parents=True)
    parts = random_parts(random, 100 if fine else 10, 3, 32, 32)
    for attribute, part in zip(("train_list", "test_list"), parts, strict=True):
        names = [name for name, _ in getattr(kind, attribute)]
        for k, name in enumerate(names):
            rows = part[k * len(part) // len(names) : (k + 1) * len(part) // len(names)]
            content = {"data": np.stack([image.reshape(-1) for image, _ in rows])}
            content["fine_labels" if fine else "labels"] = [label for _, label in rows]
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        monkeypatch.setattr(kind, attribute, [[name, md5(folder / name)] for name in names])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: ["a", "b"]}, protocol=2))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    return parts


def idx(*shape: int, content: bytes) -> bytes:
    """An array of bytes in the idx format."""
    return struct.pack(f">{1 + len(shape)}i", 0x800 + len(shape), *shape) + content


def write_mnist(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: str) -> tuple:
    raw, parts = root / kind / "raw", random_parts(random, 10, 1, 28, 28)
    raw.mkdir(parents=True)
    for prefix, part in zip(("train", "t10k"), parts, strict=True):
        images = idx(len(part), 28, 28, content=b"".join(image.tobytes() for image, _ in part))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(len(part), content=bytes(label for _, label in part)))
    return parts


def write_svhn(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> tuple:
    parts, sums = random_parts(random, 10, 3, 32, 32), {}
    for name, part in zip(("train", "test"), parts, strict=True):
        path = root / f"{name}_32x32.mat"
        images = np.stack([image.transpose(1, 2, 0) for image, _ in part], axis=-1)  # (32, 32, 3, n)
        labels = np.array([[label or 10] for _, label in part], dtype=np.uint8)  # a nought is a ten there
        scipy.io.savemat(path, {"X": images, "y": labels})
        sums[name] = ["http://absent", path.name, md5(path)]
    monkeypatch.setattr(tv.SVHN, "split_list", tv.SVHN.split_list | sums)
    return parts


def write_stl10(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> tuple:
    folder, parts = root / "stl10_binary", random_parts(random, 10, 3, 96, 96)
    folder.mkdir()
    for name, part in zip(("train", "test"), parts, strict=True):
        columns = b"".join(image.transpose(0, 2, 1).tobytes() for image, _ in part)  # column by column
        (folder / f"{name}_X.bin").write_bytes(columns)
        (folder / f"{name}_y.bin").write_bytes(bytes(label + 1 for _, label in part))
        sums = [[path.name, md5(path)] for path in (folder / f"{name}_X.bin", folder / f"{name}_y.bin")]
        rest = [["unlabeled_X.bin", "0" * 32]] if name == "train" else []
        monkeypatch.setattr(tv.STL10, f"{name}_list", [*sums, *rest])
    return parts


def paint(path: Path, colour: np.ndarray, k: int) -> None:
    """An image of one colour, whose size depends on its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20 + 5 * (k % 3), 20 + 4 * (k % 4)), tuple(colour.tolist())).save(path, quality=95)


def write_flowers102(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> tuple:
    folder, parts = root / "flowers-102", random_parts(random, 102, 3)
    ids = 1 + random.permutation(TRAIN + TEST + 3)  # three for validation, which is not read
    labels = np.full(len(ids), 77, dtype=np.uint8)
    for number, (colour, label) in zip(ids, [*parts[0], *parts[1]], strict=False):
        paint(folder / "jpg" / f"image_{number:05}.jpg", colour, number)
        labels[number - 1] = label + 1
    splits = {"trnid": ids[:TRAIN], "tstid": ids[TRAIN : TRAIN + TEST], "valid": ids[TRAIN + TEST :]}
    scipy.io.savemat(folder / "setid.mat", {name: rows[None].astype(np.uint16) for name, rows in splits.items()})
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    sums = {key: (name, md5(folder / name)) for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(tv.Flowers102, "_file_dict", tv.Flowers102._file_dict | sums)
    return parts


def write_pets(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> tuple:
    folder, parts = root / "oxford-iiit-pet", random_parts(random, 37, 3)
    (folder / "annotations").mkdir(parents=True)
    for name, part in zip(("trainval", "test"), parts, strict=True):
        lines = [f"Great_Dane_{name}{k} {label + 1} 1 1\n" for k, (_, label) in enumerate(part)]
        (folder / "annotations" / f"{name}.txt").write_text("".join(lines))
        for k, (colour, _) in enumerate(part):
            paint(folder / "images" / f"Great_Dane_{name}{k}.jpg", colour, k)
    return parts


def write_food101(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> tuple:
    folder, parts = root / "food-101", random_parts(random, 3, 3)
    (folder / "meta").mkdir(parents=True)
    for name, part in zip(("train", "test"), parts, strict=True):
        part.sort(key=lambda known: known[1])
        content: dict[str, list[str]] = {}
        for k, (colour, label) in enumerate(part):
            path = f"{('apple_pie', 'baklava', 'churros')[label]}/{name}{k}"
            content.setdefault(path.split("/")[0], []).append(path)
            paint(folder / "images" / f"{path}.jpg", colour, k)
        (folder / "meta" / f"{name}.json").write_text(json.dumps(content))
    return parts


def write_folders(
    root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch, names: tuple = ("train", "test")
) -> tuple:
    parts = random_parts(random, 3, 3)
    for name, part in zip(names, parts, strict=True):
        part.sort(key=lambda known: known[1])
        for k, (colour, label) in enumerate(part):
            paint(root / name / f"class{label}" / f"{k:03}.{('jpg', 'png', 'JPEG')[k % 3]}", colour, k)
    return parts


def write_imagenet(root: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> tuple:
    monkeypatch.setitem(DATASETS, "imagenet", replace(DATASETS["imagenet"], classes=3))
    return write_folders(root / "imagenet", random, monkeypatch, ("train", "val"))


WRITERS: dict[str, Callable] = {
    "mnist": lambda *place: write_mnist(*place, "MNIST"),
    "fashion_mnist": lambda *place: write_mnist(*place, "FashionMNIST"),
    "cifar10": lambda *place: write_cifar(*place, tv.CIFAR10),
    "cifar100": lambda *place: write_cifar(*place, tv.CIFAR100),
    "svhn": write_svhn,
    "stl10": write_stl10,
    "flowers102": write_flowers102,
    "pets": write_pets,
    "food101": write_food101,
    "imagenet": write_imagenet,
    "image_folder": write_folders,
}


def write(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[Known, Known]:
    """Write a tiny data set of that name."""
    root.mkdir(exist_ok=True)
    return WRITERS[name](root, np.random.default_rng(seed), monkeypatch)


def settings_of(name: str, root: Path, **options: object) -> Dataset:
    size = {} if DATASETS[name].image_size else {"image_size": 8}
    values = {"download": False, "mean": 0, "std": 1, "validation_fraction": 0.2, **size, **options}
    return Dataset(name=name, root=str(root), **values)


def described(name: str, known: Known) -> list[tuple]:
    """What identifies written images: bytes and label."""
    return [(image.tobytes(), label) for image, label in known]


def found(name: str, part: Part, known: Known) -> list[tuple]:
    """The same of images that were read; colours are compared with the written ones, within what JPEG loses."""
    rows = []
    for batch, labels in part.batches(3):
        for image, label in zip((batch * 255).round().to(torch.uint8).numpy(), labels.tolist(), strict=True):
            if name in IN_FILES:
                assert np.ptp(image.reshape(3, -1).astype(int), axis=1).max() <= 2
                colour = image[:, 4, 4].astype(int)
                nearest = min((abs(written.astype(int) - colour).max(), written.tobytes()) for written, _ in known)
                assert nearest[0] <= 4
                rows.append((nearest[1], label))
            else:
                rows.append((image.tobytes(), label))
    return rows


# -- the contract of every data set


def test_every_data_set_is_written_here():
    assert set(WRITERS) == set(DATASETS) - {"digits"}
    assert set(IN_FILES) == {name for name, source in DATASETS.items() if not source.image_size}


@pytest.fixture(params=list(DATASETS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_facts_hold(name, tmp_path, monkeypatch):
    if name != "digits":
        write(name, tmp_path, monkeypatch)
    images = datasets.read(settings_of(name, tmp_path))
    source = DATASETS[name]
    assert images.classes == (source.classes or 3)
    assert (images.channels, images.image_size) == (source.channels, source.image_size or 8)
    for part in (images.train, images.validation, images.test):
        batch, labels = next(part.batches(2))
        assert batch.shape == (2, images.channels, images.image_size, images.image_size)
        assert (batch.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert 0 <= batch.min() < batch.max() <= 1
        assert 0 <= part.labels.min() <= part.labels.max() < images.classes
        assert torch.equal(torch.cat([labels for _, labels in part.batches(3)]), part.labels)
        batch, labels = next(part.stream(4, seed=0, rows=slice(1, None, 2)))
        assert (len(batch), len(labels)) == (2, 2)


@pytest.mark.parametrize("name", list(WRITERS))
def test_what_was_written_is_read(name, tmp_path, monkeypatch):
    train, test = write(name, tmp_path, monkeypatch)
    images = datasets.read(settings_of(name, tmp_path))
    assert [len(part) for part in (images.train, images.validation, images.test)] == [16, 4, TEST]
    both = found(name, images.train, train) + found(name, images.validation, train)
    assert Counter(both) == Counter(described(name, train))
    assert found(name, images.test, test) == described(name, test)


@pytest.mark.parametrize("name", list(WRITERS))
def test_the_digest_is_that_of_the_data(name, tmp_path, monkeypatch):
    digests = []
    for k, seed in enumerate((0, 1)):
        with monkeypatch.context() as patch:
            write(name, tmp_path / str(k), patch, seed)
            settings = settings_of(name, tmp_path / str(k))
            digests += [datasets.read(settings).digest() for _ in range(2)]
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_the_split_is_that_of_its_seed(name, tmp_path, monkeypatch):
    if name != "digits":
        write(name, tmp_path, monkeypatch)
    first, again, other = (datasets.read(settings_of(name, tmp_path, split_seed=seed)) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    for found, expected in zip(first.test.batches(99), other.test.batches(99), strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("name", list(WRITERS))
def test_absent_and_not_to_be_had(monkeypatch, tmp_path, name, download):
    def unreachable(*args: object, **options: object) -> None:
        raise URLError("no route to host")

    files = {
        "mnist": [f"MNIST/raw/{file}" for file in FASHION_FILES],
        "fashion_mnist": [f"FashionMNIST/raw/{file}" for file in FASHION_FILES],
        "cifar10": [f"cifar-10-batches-py/{file}" for file in ("data_batch_1", "data_batch_5", "test_batch")],
        "cifar100": [f"cifar-100-python/{file}" for file in ("train", "test", "meta")],
        "svhn": ["train_32x32.mat", "test_32x32.mat"],
        "stl10": [f"stl10_binary/{part}_{kind}.bin" for part in ("train", "test") for kind in "Xy"],
        "flowers102": [f"flowers-102/{file}" for file in ("jpg", "imagelabels.mat", "setid.mat")],
        "pets": [f"oxford-iiit-pet/{file}" for file in ("images", "annotations/trainval.txt", "annotations/test.txt")],
        "food101": [f"food-101/{file}" for file in ("images", "meta/train.json", "meta/test.json")],
        "imagenet": ["imagenet/train/CLASS", "imagenet/val/CLASS"],
        "image_folder": ["train/CLASS", "val/CLASS"],
    }[name]
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    timeout = socket.getdefaulttimeout()
    with pytest.raises(UserError) as caught:
        datasets.read(settings_of(name, tmp_path / "root", download=download))
    message = str(caught.value)
    assert message.startswith(f"dataset {name} in {tmp_path / 'root'}: not there")
    if name not in ("imagenet", "image_folder"):
        assert ("no route to host" if download else "dataset.download is false") in message
    for text in (*files, str(tmp_path / "root")):
        assert text in message
    assert "\n" not in message
    assert not files_below(tmp_path)
    assert socket.getdefaulttimeout() == timeout


def test_a_download_is_used_and_made_once(monkeypatch, tmp_path):
    archive, asked = tmp_path / "archive", []

    def download(self: tv.SVHN) -> None:
        asked.append(self.filename)
        Path(self.root, self.filename).write_bytes((archive / self.filename).read_bytes())

    write("svhn", archive, monkeypatch)
    monkeypatch.setattr(tv.SVHN, "download", download)
    settings = settings_of("svhn", tmp_path / "root", download=True)
    expected = datasets.read(settings_of("svhn", archive)).digest()
    assert [datasets.read(settings).digest() for _ in range(2)] == [expected] * 2
    assert asked == ["train_32x32.mat", "test_32x32.mat"]


def test_a_download_of_another_process_is_waited_for(monkeypatch, tmp_path):
    write("svhn", tmp_path, monkeypatch)
    path = tmp_path / "test_32x32.mat"
    content = path.read_bytes()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / ".download.lock"):
            path.write_bytes(content[:99])
            loaded = pool.submit(datasets.read, settings_of("svhn", tmp_path, download=True))
            time.sleep(0.2)
            path.write_bytes(content)
        assert len(loaded.result().test) == TEST


# -- damaged files


def trust(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish the sums of the files that are there."""
    if name == "svhn":
        lists = {
            key: [url, file, md5(root / file)] for key, (url, file, _) in tv.SVHN.split_list.items() if key != "extra"
        }
        monkeypatch.setattr(tv.SVHN, "split_list", tv.SVHN.split_list | lists)
    if name == "stl10":
        sums = [[file, md5(root / "stl10_binary" / file)] for file, _ in tv.STL10.train_list[:2]]
        monkeypatch.setattr(tv.STL10, "train_list", [*sums, tv.STL10.train_list[2]])
    if name == "flowers102":
        names = {key: name for key, (name, _) in tv.Flowers102._file_dict.items() if key != "image"}
        sums = {key: (name, md5(root / "flowers-102" / name)) for key, name in names.items()}
        monkeypatch.setattr(tv.Flowers102, "_file_dict", tv.Flowers102._file_dict | sums)


CHECKED = {
    "cifar10": "cifar-10-batches-py/data_batch_3",
    "cifar100": "cifar-100-python/meta",
    "svhn": "train_32x32.mat",
    "stl10": "stl10_binary/train_X.bin",
    "flowers102": "flowers-102/setid.mat",
}
UNCHECKED = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion_mnist": "FashionMNIST/raw/t10k-labels-idx1-ubyte",
    "pets": "oxford-iiit-pet/annotations/trainval.txt",
    "food101": "food-101/meta/test.json",
}


def refused(settings: Dataset) -> str:
    """The one line by which a data set is refused, when it is loaded or read."""
    with pytest.raises(UserError) as caught:
        images = datasets.read(settings)
        for part in (images.train, images.validation, images.test):
            list(part.batches(4))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(("name", "file"), CHECKED.items())
def test_files_of_another_sum_are_refused_and_kept(monkeypatch, tmp_path, name, file, download):
    write(name, tmp_path, monkeypatch)
    path = tmp_path / file
    path.write_bytes(content := path.read_bytes() + b"x")
    message = refused(settings_of(name, tmp_path, download=download))
    assert message.startswith(f"dataset {name} in {tmp_path}: {file} is damaged, or another file: its MD5 sum")
    assert path.read_bytes() == content


def test_pickles_of_another_sum_are_never_read(monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "opened"),)

    for name, file in (("cifar10", "cifar-10-batches-py/data_batch_1"), ("cifar100", "cifar-100-python/meta")):
        write(name, tmp_path, monkeypatch)
        (tmp_path / file).write_bytes(pickle.dumps(Evil()))
        refused(settings_of(name, tmp_path))
        assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "file"), [*UNCHECKED.items(), *((name, CHECKED[name]) for name in ("svhn", "stl10", "flowers102"))]
)
def test_truncated_files(monkeypatch, tmp_path, name, file, keep):
    write(name, tmp_path, monkeypatch)
    path = tmp_path / file
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    if name == "pets":
        path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\nGreat_Dane")  # missing lines cannot be noticed
    trust(name, tmp_path, monkeypatch)
    message = refused(settings_of(name, tmp_path))
    assert message.startswith(f"dataset {name} in {tmp_path}: ")
    assert file in message or "holds no images" in message or "expected" in message


@pytest.mark.parametrize("name", IN_FILES)
def test_a_truncated_image_is_named(monkeypatch, tmp_path, name):
    write(name, tmp_path, monkeypatch)
    path = sorted(path for path in files_below(tmp_path) if path.suffix == ".jpg")[0]
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(settings_of(name, tmp_path)).startswith(f"{path}: not a readable image: ")


@pytest.mark.parametrize("name", ["flowers102", "pets", "food101"])
def test_an_image_that_is_listed_is_missing(monkeypatch, tmp_path, name):
    write(name, tmp_path, monkeypatch)
    images = [path for path in files_below(tmp_path) if path.suffix == ".jpg"]
    for path in images[:2]:
        path.unlink()
    message = refused(settings_of(name, tmp_path))
    assert message.startswith(f"dataset {name} in {tmp_path}: ")
    assert "is missing" in message
    assert any(str(path) in message for path in images[:2])


LABELS, IMAGES = "MNIST/raw/train-labels-idx1-ubyte", "MNIST/raw/train-images-idx3-ubyte"
ANNOTATIONS = "oxford-iiit-pet/annotations/test.txt"
UNFIT = [
    ("mnist", LABELS, idx(TRAIN, content=bytes(TRAIN - 1) + b"\n"), "labels from 0 to 10, expected 0 to 9"),
    ("mnist", LABELS, idx(7, content=bytes(7)), "images of shape (20, 1, 28, 28), expected (7, 1, 28, 28)"),
    ("mnist", IMAGES, idx(TRAIN, 7, 7, content=bytes(TRAIN * 49)), "shape (20, 1, 7, 7), expected (20, 1, 28, 28)"),
    ("pets", ANNOTATIONS, b"Great_Dane_test0 38 1 1\n", "labels from 37 to 37, expected 0 to 36"),
    ("pets", ANNOTATIONS, b"Great_Dane_test0 0 1 1\n", "labels from -1 to -1, expected 0 to 36"),
    ("pets", ANNOTATIONS, b"", "a part of it holds no images"),
    ("food101", "food-101/meta/test.json", b'{"baklava": []}', "must name the same classes"),
]


@pytest.mark.parametrize(("name", "file", "content", "expected"), UNFIT)
def test_well_formed_files_that_do_not_fit(monkeypatch, tmp_path, name, file, content, expected):
    write(name, tmp_path, monkeypatch)
    (tmp_path / file).write_bytes(content)
    message = refused(settings_of(name, tmp_path))
    assert message.startswith(f"dataset {name} in {tmp_path}: ")
    assert expected in message


def test_old_pickles_of_mnist_are_ignored(monkeypatch, tmp_path):
    write("mnist", tmp_path, monkeypatch)
    expected = datasets.read(settings_of("mnist", tmp_path)).digest()
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5)), tmp_path / "MNIST/processed" / name)
    assert datasets.read(settings_of("mnist", tmp_path)).digest() == expected


# -- folders of one's own


def test_val_is_for_testing_where_there_is_no_test(monkeypatch, tmp_path):
    write_folders(tmp_path, np.random.default_rng(0), monkeypatch, ("train", "val"))
    first = datasets.read(settings_of("image_folder", tmp_path))
    (tmp_path / "val").rename(tmp_path / "test")
    assert torch.equal(datasets.read(settings_of("image_folder", tmp_path)).test.labels, first.test.labels)


def test_classes_of_both_parts_must_agree(monkeypatch, tmp_path):
    write("image_folder", tmp_path, monkeypatch)
    (tmp_path / "test" / "class1").rename(tmp_path / "test" / "other")
    message = refused(settings_of("image_folder", tmp_path))
    assert "must hold the same classes, but class1 (one of 2) is in one alone" in message


def test_a_class_without_images(monkeypatch, tmp_path):
    write("image_folder", tmp_path, monkeypatch)
    (tmp_path / "train" / "class3").mkdir()
    (tmp_path / "train" / "class3" / "notes.txt").write_text("none yet")
    assert "no valid file for the classes class3" in refused(settings_of("image_folder", tmp_path))


def test_a_part_of_imagenet_is_refused(monkeypatch, tmp_path):
    write_folders(tmp_path / "imagenet", np.random.default_rng(0), monkeypatch, ("train", "val"))
    assert "holds 3 classes, expected 1000" in refused(settings_of("imagenet", tmp_path))


def test_grey_files(monkeypatch, tmp_path):
    write("image_folder", tmp_path, monkeypatch)
    images = datasets.read(settings_of("image_folder", tmp_path, channels=1))
    assert images.channels == next(images.test.batches(2))[0].shape[1] == 1


def test_the_root_of_a_folder_counts_and_that_of_others_does_not(monkeypatch, tmp_path):
    def digest(name: str, root: Path) -> str:
        dataset, network = Dataset(name=name, root=str(root)), Network(architecture="mlp")
        experiment = schema.experiment({"dataset": dataset, "network": network})
        return stages.all_digests(experiment)["pretrain"]

    write("image_folder", tmp_path / "a", monkeypatch)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # times of modification, too
    first, link = digest("image_folder", tmp_path / "a"), tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    assert first == digest("image_folder", tmp_path / "a") == digest("image_folder", link)
    assert first != digest("image_folder", tmp_path / "b")
    assert digest("digits", tmp_path / "a") == digest("digits", tmp_path / "b")
    monkeypatch.setenv("PDIFF_DATA", str(tmp_path / "a"))
    assert digest("image_folder", Path("")) != first  # "." is the folder that this is run in
    paint(tmp_path / "a" / "train" / "class0" / "new.jpg", np.zeros(3, dtype=np.uint8), 0)
    os.utime(tmp_path / "a" / "train" / "class0", (1, 1))
    assert digest("image_folder", tmp_path / "a") != first


# -- what is read once


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data sets that are read while a test runs."""
    found: list[str] = []
    read = datasets.read
    monkeypatch.setattr(datasets, "read", lambda settings: (found.append(settings.name), read(settings))[1])
    return found


def test_the_last_data_set_is_kept_while_its_settings_are_the_same(numbers, reads):
    first, same, other = (Dataset(name="numbered", validation_fraction=x) for x in (0.2, 0.2, 0.5))
    images = datasets.load(first)
    assert datasets.load(same) is images and reads == ["numbered"]
    assert len(datasets.load(other).validation) == 25
    assert datasets.load(first).digest() == images.digest()
    assert reads == ["numbered"] * 3, "one data set is kept at a time"


@pytest.mark.parametrize("name", list(WRITERS))
def test_files_that_change_are_read_again(name, tmp_path, monkeypatch, reads):
    """Files without images by their times of modification, those with images by what is in their folders."""
    write(name, tmp_path, monkeypatch)
    settings = settings_of(name, tmp_path)
    images = datasets.load(settings)
    (tmp_path / "preprocessed").mkdir()
    assert datasets.load(settings) is images
    changes = [lambda path=path: os.utime(path, (1, 1)) for path in files_below(tmp_path) if not is_image(path)]
    folders = {path.parent for path in files_below(tmp_path) if is_image(path)}
    changes += [lambda path=path: os.utime(path, (1, 1)) for path in folders]  # as a new file in it does
    assert len(changes) >= 2
    for k, change in enumerate(changes):
        change()
        for _ in range(2):
            assert datasets.load(settings).digest() == images.digest()
        assert len(reads) == 2 + k


def is_image(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png")


def test_an_image_more_is_seen(monkeypatch, tmp_path):
    write("image_folder", tmp_path, monkeypatch)
    settings = settings_of("image_folder", tmp_path)
    before = len(datasets.load(settings).test)
    time.sleep(0.01)
    paint(tmp_path / "test" / "class1" / "new.png", np.zeros(3, dtype=np.uint8), 0)
    assert len(datasets.load(settings).test) == before + 1


def test_a_data_set_that_could_not_be_read_is_tried_again(monkeypatch, tmp_path):
    settings = settings_of("svhn", tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="not there"):
            datasets.load(settings)
    write("svhn", tmp_path, monkeypatch)
    assert len(datasets.load(settings).test) == TEST


@pytest.mark.slow
def test_an_experiment_reads_its_images_once(workspace, reads):
    assert main(["main", "--tag", "tiny.yaml"]) == 0
    assert reads == ["digits"]


# -- what is preprocessed once


@pytest.mark.parametrize("writable", [True, False])
def test_preprocessed_images_lie_beside_the_data_or_at_the_default_place(monkeypatch, tmp_path, writable):
    write("pets", tmp_path / "root", monkeypatch)
    monkeypatch.setenv("PDIFF_DATA", str(tmp_path / "own"))
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    images = datasets.read(settings_of("pets", tmp_path / "root", augment=True))
    for part in (images.train, images.validation, images.test):
        next(part.stream(2, seed=0))
    stored = [path for path in files_below(tmp_path) if path.suffix == ".uint8"]
    assert {path.parent for path in stored} == {tmp_path / ("root" if writable else "own") / "preprocessed"}
    assert sorted(path.stat().st_size for path in stored) == [4 * 3 * 64, 6 * 3 * 64]  # none of the augmented part


# -- settings


def test_digits_are_those_of_scikit_learn_each_once():
    images = datasets.read(Dataset(name="digits", validation_fraction=0.2))
    parts = images.train, images.validation, images.test
    assert [len(part) for part in parts] == [958, 240, 599]
    found = Counter((p.raw.images[i].numpy().tobytes(), int(p.labels[i])) for p in parts for i in range(len(p)))
    source = load_digits()
    scaled = np.rint(source.images * 255 / 16).astype(np.uint8)
    assert found == Counter((i.tobytes(), int(label)) for i, label in zip(scaled, source.target, strict=True))


def numbered(count: int) -> Pixels:
    """Images of which every pixel is the image's number, and so is its label."""
    numbers = torch.arange(count)
    return Pixels(numbers.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).clone(), numbers)


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of 50 and 7 numbered images."""
    monkeypatch.setitem(DATASETS, "numbered", Source(lambda root, download: (numbered(50), numbered(7)), 50, 1, 4))


def test_validation_images_are_never_trained_on(numbers):
    images = datasets.read(Dataset(name="numbered", validation_fraction=0.2, mean=(0,), std=(1,)))
    validation, train = set(images.validation.labels.tolist()), set(images.train.labels.tolist())
    assert len(validation) == 10
    assert validation | train == set(range(50))
    assert not validation & train
    epochs = [labels for _, labels in islice(images.train.stream(10, seed=3), 8)]
    assert sorted(torch.cat(epochs[:4]).tolist()) == sorted(torch.cat(epochs[4:]).tolist()) == sorted(train)
    for batch, labels in images.train.batches(16):
        assert torch.equal((batch[:, 0, 0, 0] * 255).round().long(), labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 0.001}, r"validation_fraction 0\.001 of 50 training images"),
        ({"validation_fraction": 0.999}, r"validation_fraction 0\.999 of 50 training images"),
        ({"image_size": 16, "resize": 8}, r"image_size <= dataset\.resize must hold, but got \(16, 8\)"),
        ({"resize": 3}, r"image_size <= dataset\.resize must hold, but got \(4, 3\)"),
    ],
)
def test_a_split_or_a_size_that_does_not_fit(numbers, settings, message):
    with pytest.raises(UserError, match=message):
        datasets.read(Dataset(name="numbered", **settings))


@pytest.mark.parametrize("name", IN_FILES)
def test_files_need_a_size(monkeypatch, tmp_path, name):
    write(name, tmp_path, monkeypatch)
    message = refused(settings_of(name, tmp_path, image_size=0))
    assert message == f"dataset.image_size 0: images of {name} vary in size, expected a side, such as 224"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5, 0.5)}, "dataset.mean holds 2 numbers, expected 1 or 3"),
        ({"std": (0.5, 0.5)}, "dataset.std holds 2 numbers, expected 1 or 3"),
        ({"channels": 1}, "dataset.channels 1: svhn has 3"),
    ],
)
def test_colours_that_do_not_fit(monkeypatch, tmp_path, settings, message):
    write("svhn", tmp_path, monkeypatch)
    assert refused(settings_of("svhn", tmp_path, **settings)).startswith(message)


def test_root_and_variable_are_honoured(monkeypatch, tmp_path):
    default = datasets.data_root(Dataset(name="digits"))
    assert default == Path.home() / ".cache" / "pdiff" / "datasets"
    monkeypatch.setenv("PDIFF_DATA", str(tmp_path))
    assert datasets.data_root(Dataset(name="digits")) == tmp_path
    assert datasets.data_root(Dataset(name="digits", root="~/own")) == Path.home() / "own"


@pytest.mark.parametrize("name", IN_FILES)
def test_a_root_may_be_relative(monkeypatch, tmp_path, name):
    write(name, tmp_path, monkeypatch)
    expected = datasets.read(settings_of(name, tmp_path)).digest()
    monkeypatch.chdir(tmp_path)
    for root in (".", f"../{tmp_path.name}/"):
        images = datasets.read(settings_of(name, root))
        assert len(list(images.test.batches(1))) == TEST
        assert images.digest() == expected


# -- Debian's package


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny dataset-fashion-mnist."""
    write("fashion_mnist", tmp_path / "source", monkeypatch)
    folder = tmp_path / "debian"
    folder.mkdir()
    for path in files_below(tmp_path / "source"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(loaders, "DEBIAN_FASHION_MNIST", folder)
    monkeypatch.setenv("PDIFF_DATA", str(tmp_path / "root"))
    return folder


def load_fashion(**options: object) -> Images:
    return datasets.read(Dataset(name="fashion_mnist", download=False, **options))


def test_fashion_mnist_is_read_from_the_debian_package(debian, tmp_path):
    images = load_fashion(channels=3, image_size=32)
    assert (len(images.train), len(images.validation), len(images.test)) == (18, 2, 6)
    assert next(images.test.batches(5))[0].shape == (5, 3, 32, 32)
    assert sorted(path.name for path in files_below(tmp_path / "root")) == sorted(FASHION_FILES)
    assert images.digest() == datasets.read(Dataset(name="fashion_mnist", root=str(tmp_path / "source"))).digest()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"x" + b, lambda b: b[:10] + b"\xff" + b[11:]]
)
def test_a_damaged_package_leaves_nothing_half_written(debian, tmp_path, damage):
    (path,) = debian.glob("train-images*")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=rf"dataset fashion_mnist in .*: {path}: damaged: .*; install .* again"
    ) as caught:
        load_fashion()
    assert "\n" not in str(caught.value)
    assert not [p for p in files_below(tmp_path / "root") if p.name.startswith((".", "train-images"))]
