"""Batches against torchvision's transforms, PIL's own resizing, and numbered images; images in memory and in files."""

import multiprocessing
import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pdiff.errors import UserError
from pdiff.networks import images
from pdiff.networks.images import Files, Part, Pixels
from pdiff.networks.options import Dataset

PLAIN = Dataset(name="any", image_size=16, resize=24, mean=(0,), std=(1,))


def noise(count: int, *shape: int) -> Pixels:
    """Random images."""
    return Pixels(
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)),
        torch.arange(count),
    )


def photographs(folder: Path, count: int = 10) -> Files:
    """Smooth coloured images of several sizes and formats; their labels number them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = [f"{k:02}.{('jpg', 'png', 'jpeg')[k % 3]}" for k in range(count)]
    for k, name in enumerate(names):
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40 + 3 * k, 60 - 2 * k), Image.Resampling.BICUBIC).save(folder / name)
    return Files(folder, np.array([os.fsencode(name) for name in names]), torch.arange(count))


def by_hand(path: Path, resize: int, size: int) -> np.ndarray:
    """An image brought to a size by PIL alone, (channels, size, size)."""
    image = Image.open(path).convert("RGB")
    width, height = (resize * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def gathered(part: Part, size: int = 4, **options: object) -> torch.Tensor:
    """All images of a part, in order, as bytes."""
    return (torch.cat([batch for batch, _ in part.batches(size, **options)]) * 255).round().to(torch.uint8)


@pytest.fixture(params=["memory", "files", "store"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Part]:
    """Parts of ten images, in memory, decoded at every use, and decoded once."""

    def build(settings: Dataset = PLAIN, **options: object) -> Part:
        raw = noise(10, 3, 20, 30) if request.param == "memory" else photographs(tmp_path / "files")
        store = tmp_path / "store" if request.param == "store" else None
        return Part(raw, settings, store=store, **options)

    return build


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded while a test runs, in this process."""
    found: list[str] = []
    load = images.pil_loader
    monkeypatch.setattr(images, "pil_loader", lambda path: (found.append(path.name), load(path))[1])
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return found


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
        [
            v2.Resize(resize or size, antialias=True),
            v2.CenterCrop(size),
            lambda image: image / 255,
            v2.Normalize(mean, std),
        ]
    )
    found = torch.cat([batch for batch, _ in part.batches(2)])
    assert found.shape == (5, 3, size, size)
    torch.testing.assert_close(found, torch.stack([oracle(image) for image in pixels.images]))


@pytest.mark.parametrize("store", [None, "store"])
@pytest.mark.parametrize(("resize", "size"), [(24, 16), (0, 16), (64, 64), (48, 20)])
def test_files_are_preprocessed_as_by_hand(tmp_path, resize, size, store):
    files = photographs(tmp_path / "files", 7)
    settings = Dataset(name="any", resize=resize, image_size=size, mean=(0,), std=(1,))
    part = Part(files, settings, store=store and tmp_path / store)
    for _ in range(2):
        found = gathered(part, 3).numpy().astype(int)
        expected = np.stack([by_hand(files.path(k), resize or size, size) for k in range(7)])
        assert abs(found - expected).max() <= 1  # they round in other ways
    assert torch.equal(torch.cat([labels for _, labels in part.batches(3)]), torch.arange(7))


def test_grey_is_repeated_where_colour_is_asked_for():
    part = Part(noise(2, 1, 4, 4), Dataset(name="any", channels=3, mean=(0, 0.5, 1), std=(1, 2, 4)))
    (batch, _), *_ = part.batches(2)
    grey = part.raw.images[:, 0].double() / 255
    oracle = torch.stack([grey, (grey - 0.5) / 2, (grey - 1) / 4], dim=1)
    torch.testing.assert_close(batch.double(), oracle, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("RGB", (77, 77, 77)), ("CMYK", (0, 0, 0, 178)), ("P", 77)])
def test_files_of_every_mode_are_read_as_colour_or_grey(tmp_path, mode, colour):
    image = Image.new(mode, (9, 7), colour)
    if mode == "P":
        image.putpalette([k // 3 for k in range(768)])
    image.save(tmp_path / "0.tif")
    for channels in (1, 3):
        files = Files(tmp_path, np.array([b"0.tif"]), torch.zeros(1, dtype=torch.long), channels)
        found = gathered(Part(files, Dataset(name="any", image_size=4, mean=(0,), std=(1,))))
        assert found.shape == (1, channels, 4, 4)
        assert (found == 77).all()


# -- training batches, rows


@pytest.mark.parametrize("augment", [False, True])
def test_batch_k_depends_on_seed_and_k_alone(make, augment):
    part = make(augment=augment)
    whole = list(islice(part.stream(4, seed=1), 7))
    for start in (1, 3, 6):
        torch.manual_seed(start)
        for found, expected in zip(part.stream(4, seed=1, start=start), whole[start:], strict=False):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    assert not torch.equal(next(part.stream(4, seed=2))[0], whole[0][0])


def test_a_stream_that_is_not_augmented_shows_every_image_once_an_epoch(make):
    part = make()
    expected = gathered(part)
    for epoch in range(2):
        batches = list(islice(part.stream(5, seed=0, start=2 * epoch), 2))
        labels = torch.cat([label for _, label in batches])
        assert sorted(labels.tolist()) == list(range(10))
        found = (torch.cat([batch for batch, _ in batches]) * 255).round().to(torch.uint8)
        assert torch.equal(found, expected[labels])


def test_augmented_images_differ_every_time_and_only_in_training(make):
    part = make(augment=True)
    first, second = (batch for batch, _ in islice(part.stream(10, seed=0), 2))
    assert first.shape == second.shape == (10, 3, 16, 16)
    assert not torch.equal(first, second)
    assert torch.equal(gathered(part), gathered(make()))


def test_augmentation_is_that_of_torchvision(make):
    part = make(augment=True)
    oracle = v2.Compose([v2.RandomResizedCrop(16, antialias=True), v2.RandomHorizontalFlip()])
    for k, (batch, labels) in enumerate(islice(part.stream(4, seed=5), 2)):
        for image, i in zip(batch, labels.tolist(), strict=True):
            torch.manual_seed(images.stream(5, k) ^ i)
            assert torch.equal((image * 255).round().to(torch.uint8), oracle(part.raw[i]))


@pytest.mark.parametrize("augment", [False, True])
def test_augmentation_leaves_the_global_generator_alone(make, augment):
    part = make(augment=augment)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(part.stream(4, seed=1))
    next(part.batches(4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_rows_of_all_processes_are_the_whole_batches(make, augment, world):
    part = make(augment=augment)
    shares = [slice(rank, None, world) for rank in range(world)]
    for run in (lambda rows: part.batches(4, rows=rows), lambda rows: islice(part.stream(4, seed=3, rows=rows), 4)):
        for whole, *parts in zip(run(slice(None)), *map(run, shares), strict=True):
            for k in range(2):
                joined = torch.empty_like(whole[k])
                for rows, share in zip(shares, parts, strict=True):
                    joined[rows] = share[k]
                assert torch.equal(joined, whole[k])


def test_a_process_without_rows_gets_an_empty_batch(make):
    *_, (batch, labels) = make().batches(9, rows=slice(3, None, 4))
    assert batch.shape == (0, 3, 16, 16)
    assert labels.shape == (0,)


def test_only_the_rows_asked_for_are_decoded(tmp_path, decoded):
    part = Part(photographs(tmp_path), PLAIN, augment=True)
    for labels in (torch.cat([labels for _, labels in part.batches(4, rows=slice(1, None, 2))]),):
        assert decoded == [part.raw.path(k).name for k in labels.tolist()]
        assert labels.tolist() == [1, 3, 5, 7, 9]
    decoded.clear()
    _, labels = next(part.stream(6, seed=0, rows=slice(0, None, 3)))
    assert decoded == [part.raw.path(k).name for k in labels.tolist()]
    assert len(labels) == 2


@pytest.mark.slow
@pytest.mark.parametrize("augment", [False, True])
def test_workers_make_the_same_batches(make, monkeypatch, augment):
    part = make(augment=augment)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    alone = [*islice(part.stream(4, seed=1), 3), *part.batches(4)]
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for found, expected in zip([*islice(part.stream(4, seed=1), 3), *part.batches(4)], alone, strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_fewer_images_than_a_batch(make):
    batches = list(islice(make().stream(64, seed=0), 2))
    assert [len(batch) for batch, _ in batches] == [64, 64]  # whole shuffles, one after the other
    assert all(sorted(labels[:60].tolist()) == sorted([*range(10)] * 6) for _, labels in batches)


# -- preprocessed once


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_images_are_decoded_once(tmp_path, decoded):
    files = photographs(tmp_path / "files")
    first = gathered(Part(files, PLAIN, store=tmp_path / "store"))
    assert sorted(decoded) == sorted(os.fsdecode(name) for name in files.names)
    again = Part(files, PLAIN, store=tmp_path / "store")
    assert torch.equal(gathered(again), first)
    next(again.stream(4, seed=0))
    assert len(decoded) == 10
    (name,) = files_below(tmp_path / "store")
    assert (tmp_path / "store" / name).stat().st_size == 10 * 3 * 16 * 16


def test_what_is_augmented_is_not_kept(tmp_path, decoded):
    part = Part(photographs(tmp_path / "files"), PLAIN, augment=True, store=tmp_path / "store")
    gathered(part)
    next(part.stream(4, seed=0))
    assert len(decoded) == 14
    assert not files_below(tmp_path / "store")


def test_what_is_preprocessed_is_never_written_to(tmp_path, monkeypatch):
    from_file, mapped = torch.from_file, []

    def noted(*arguments, **options):
        mapped.append(from_file(*arguments, **options))
        return mapped[-1]

    monkeypatch.setattr(torch, "from_file", noted)
    part = Part(photographs(tmp_path / "files"), PLAIN, store=tmp_path / "store")
    first = gathered(part)
    mapped[0].zero_()
    assert torch.equal(gathered(Part(part.raw, PLAIN, store=part.store)), first)


@pytest.mark.parametrize(
    "change",
    [
        lambda files, settings: (files.path(3).write_bytes(files.path(6).read_bytes()), (files, settings))[1],
        lambda files, settings: (os.utime(files.path(3), (1, 1)), (files, settings))[1],
        lambda files, settings: (files.select(torch.arange(9, -1, -1)), settings),
        lambda files, settings: (files, settings.model_copy(update={"resize": 20})),
        lambda files, settings: (files, settings.model_copy(update={"image_size": 20})),
        lambda files, settings: (Files(files.folder, files.names, files.labels, 1), settings),
    ],
)
def test_whatever_changes_images_leads_to_another_store(tmp_path, decoded, change):
    files = photographs(tmp_path / "files")
    gathered(Part(files, PLAIN, store=tmp_path / "store"))
    files, settings = change(files, PLAIN)
    decoded.clear()
    found = gathered(Part(files, settings, store=tmp_path / "store"))
    assert len(decoded) == 10
    assert len(files_below(tmp_path / "store")) == 2
    assert torch.equal(found, gathered(Part(files, settings)))


def test_normalisation_leads_to_no_other_store(tmp_path, decoded):
    files = photographs(tmp_path / "files")
    for mean in (0, 0.5):
        settings = PLAIN.model_copy(update={"mean": (mean,), "root": str(mean)})
        gathered(Part(files, settings, store=tmp_path / "store"))
    assert len(decoded) == 10


@pytest.mark.slow
def test_two_processes_at_once_decode_once(tmp_path, monkeypatch):
    files, log, load = photographs(tmp_path / "files"), tmp_path / "log", images.pil_loader

    def slow(path: Path) -> Image.Image:
        time.sleep(0.02)  # long enough to meet
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return load(path)

    monkeypatch.setattr(images, "pil_loader", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    parts = [Part(files, PLAIN, store=tmp_path / "store") for _ in range(2)]

    def decode(part: Part) -> None:
        torch.set_num_threads(1)  # threads do not survive a fork
        gathered(part)

    processes = [multiprocessing.get_context("fork").Process(target=decode, args=(part,)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(log.read_text().split()) == sorted(os.fsdecode(name) for name in files.names)


def test_a_store_that_was_interrupted_is_written_anew(tmp_path, monkeypatch):
    files = photographs(tmp_path / "files")
    with monkeypatch.context() as patch:
        patch.setattr(images, "STORED_BATCH", 2)
        calls = iter([*range(5)])
        load = images.pil_loader
        patch.setattr(images, "pil_loader", lambda path: (next(calls), load(path))[1])
        patch.setattr(os, "cpu_count", lambda: 1)
        with pytest.raises(UserError):  # the sixth image
            gathered(Part(files, PLAIN, store=tmp_path / "store"))
    assert not files_below(tmp_path / "store")
    expected = gathered(Part(files, PLAIN, store=tmp_path / "store"))
    (name,) = files_below(tmp_path / "store")
    path = tmp_path / "store" / name
    path.with_name(f".{name}.0123abcd.tmp").write_bytes(b"left by a killed process")
    path.write_bytes(path.read_bytes()[:-1])  # by a disk that was full, or a copy that broke off
    assert torch.equal(gathered(Part(files, PLAIN, store=tmp_path / "store")), expected)
    assert files_below(tmp_path / "store") == [name]


def test_without_room_images_are_decoded_at_every_use(tmp_path, monkeypatch, decoded):
    part = Part(photographs(tmp_path / "files"), PLAIN, store=tmp_path / "store")
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 10 * 3 * 16 * 16 - 1))
    assert torch.equal(gathered(part), gathered(Part(part.raw, PLAIN)))
    gathered(part)
    assert len(decoded) == 30
    assert not files_below(tmp_path / "store")


# -- damaged files


@pytest.mark.parametrize("cores", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["03.jpg", "04.png"])
@pytest.mark.parametrize("content", [b"", b"GIF89a", b"no image", None])
def test_a_damaged_image_is_named(tmp_path, monkeypatch, cores, name, content):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    files = photographs(tmp_path / "files")
    path = tmp_path / "files" / name
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    for part in (Part(files, PLAIN, augment=True), Part(files, PLAIN, store=tmp_path / "store")):
        with pytest.raises(UserError) as caught:
            for _ in zip(part.stream(10, seed=0), range(1), strict=False):
                pass
        assert str(caught.value).startswith(f"{path}: not a readable image: ")
        assert "\n" not in str(caught.value)
    assert not files_below(tmp_path / "store")
