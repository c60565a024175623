"""Vectors that are not in memory, against the same in memory; and how much memory large collections take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdiff import files
from pdiff.method import vectors
from pdiff.method.autoencoders.pca import PCA
from pdiff.method.baselines import BASELINES
from pdiff.method.collection import Collection
from pdiff.method.generators import GaussianOptions, LatentDiffusionOptions
from pdiff.method.generators.base import Generator
from pdiff.method.novelty import Span, squared_distances
from pdiff.method.options import Section
from pdiff.method.standardize import Standardizer
from pdiff.method.vectors import Vectors, dense, joined, over_columns


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as large, and a block holds a few columns."""
    monkeypatch.setattr(vectors, "IN_MEMORY", 0)
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 8 * 7 * 4)
    monkeypatch.setattr(files, "SCRATCH_BYTES", 1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(x: torch.Tensor) -> Vectors:
    return Vectors(torch.arange(len(x)), x.shape[1], lambda rows, part: x[rows][:, part])


def test_they_are_indexed_as_a_tensor_is(large: None) -> None:
    x = random(9, 13)
    lazy = of(x)
    assert lazy.shape == x.shape and lazy.numel() == x.numel() and len(lazy) == 9
    for rows in (slice(2, 7), [4, 1], torch.tensor([8, 0, 0]), slice(0, 9, 2), torch.arange(3, 6)):
        assert torch.equal(dense(lazy[rows]), x[rows])
        assert torch.equal(lazy[rows][:, 3:9], x[rows][:, 3:9])
    assert torch.equal(lazy[1:8][[2, 0]][:, -4:], x[[3, 1], -4:])
    assert torch.equal(torch.cat([dense(part) for part in lazy.split(4)]), x)
    assert torch.equal(dense(joined([lazy, x[:2]])), torch.cat([x, x[:2]]))
    assert torch.equal(over_columns(lambda block: block.amax(0), lazy), x.amax(0))


def test_a_collection_is_standardised_as_in_memory(mixed: Collection, large: None) -> None:
    standardizer = Standardizer.fit(mixed)
    x, lazy = standardizer.encode(mixed), standardizer.vectors(mixed)
    assert isinstance(lazy, Vectors) and torch.equal(dense(lazy), x)
    decoded, expected = standardizer.decode(lazy), standardizer.decode(x)
    assert list(decoded.tensors) == list(expected.tensors)
    assert all(torch.equal(decoded.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_scalars_do_not_depend_on_the_blocks(mixed: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([6, 1, 3, 2])
    expected = Standardizer.fit(mixed.select(rows))
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 1)
    for slot, other in zip(Standardizer.fit(mixed, rows).slots, expected.slots, strict=True):
        found = torch.tensor([slot.mean, slot.std, slot.variance])
        torch.testing.assert_close(found, torch.tensor([other.mean, other.std, other.variance]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7)])
def test_principal_components_are_those_of_a_tensor(shape: tuple[int, int], large: None) -> None:
    x, new = random(*shape), random(5, shape[1], seed=1)
    expected, pca = PCA.fit(x, latent_size=4), PCA.fit(of(x), latent_size=4)
    torch.testing.assert_close(pca(new), expected(new), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pca.encode(of(new)), pca.encode(new), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense(pca.vectors(pca.encode(new))), pca(new), rtol=1e-4, atol=1e-5)
    assert pca.loss == pytest.approx((x - pca(x)).square().mean().item(), rel=1e-4)


def test_distances_are_those_of_tensors(large: None) -> None:
    a, b = random(5, 40), random(8, 40, seed=1)
    torch.testing.assert_close(squared_distances(of(a), of(b)), squared_distances(a, b))
    torch.testing.assert_close(Span.fit(of(b)).outside(of(a)), Span.fit(b).outside(a))


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_baselines_are_those_of_tensors(name: str, mixed: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    if BASELINES[name].parts or len(mixed) < BASELINES[name].originals:
        pytest.skip("needs more than a collection")
    expected = BASELINES[name](mixed, count=3)
    monkeypatch.setattr(vectors, "IN_MEMORY", 0)
    found = BASELINES[name](mixed, count=3)
    for tensor in expected.tensors:
        assert torch.allclose(found.tensors[tensor], expected.tensors[tensor], rtol=1e-3, atol=1e-5), tensor


SHORT = LatentDiffusionOptions.model_validate({"diffusion": {"steps": 3, "heldout_fraction": 0.2}})


@pytest.mark.parametrize("options", [SHORT, GaussianOptions(), GaussianOptions(diagonal=True)], ids=str)
def test_generators_are_those_of_tensors(options: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection({"a": random(12, 6, 5), "b": random(12, 3, seed=1)})
    expected = Generator.fit(collection, options)
    monkeypatch.setattr(vectors, "IN_MEMORY", 0)
    monkeypatch.setattr(files, "SCRATCH_BYTES", 1)
    Generator.fit(collection, options).save(tmp_path)
    loaded = Generator.load(tmp_path)
    wanted, found = expected.sample(4, seed=1), loaded.sample(4, seed=1)
    for name in wanted.tensors:
        torch.testing.assert_close(found.tensors[name], wanted.tensors[name], rtol=1e-3, atol=1e-4)
    if loaded.compresses:
        ours, theirs = loaded.reconstruct(collection), expected.reconstruct(collection)
        torch.testing.assert_close(ours.tensors["a"], theirs.tensors["a"], rtol=1e-3, atol=1e-4)


MEMORY = """
import json, sys, threading
from pathlib import Path
import torch
from pdiff.files import new_tensors, scratch_folder
from pdiff.method.autoencoders import PCAOptions
from pdiff.method.collection import Collection
from pdiff.method.generators import DiffusionOptions, LatentDiffusionOptions
from pdiff.method.generators.base import Generator
from pdiff.method.novelty import squared_distances

COUNT, SIZE, folder = 40, 500_000, Path(sys.argv[1])

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def save(path, count, size):
    with new_tensors(path, {"w": torch.empty(1).expand(count, size)}) as tensors:
        for row in tensors["w"]:
            row.normal_(generator=generator)
    index = {"layout": {"w": {"shape": [size], "dtype": "float32"}}, "checkpoints": [*range(count)]}
    path.with_suffix(".json").write_text(json.dumps(index))

def everything(folder, count, size):
    save(folder / "c.safetensors", count, size)
    collection = Collection.load(folder / "c.safetensors")
    options = LatentDiffusionOptions(autoencoder=PCAOptions(variance=1.0), diffusion=DiffusionOptions(steps=2))
    fitted = Generator.fit(collection, options)
    fitted.save(folder / "generator")
    networks = Generator.load(folder / "generator").sample(count)
    networks.save(folder / "generated.safetensors")
    x, y = (fitted.standardizer.vectors(c) for c in (collection, networks))
    assert squared_distances(y, x).isfinite().all()
    return fitted.sizes()["latent_size"]

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, private() - before)

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
everything(folder / "small", 10, 50)  # what is imported and allocated once
peak, before, done = 0, private(), threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
with scratch_folder(folder):
    latents = everything(folder / "large", COUNT, SIZE)
done.set()
watcher.join()
assert latents >= 30
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounts of memory")
def test_a_large_collection_is_never_in_memory(tmp_path: Path) -> None:
    """80 MB of numbers, of which 4 MB at a time may be in memory: fit, save, load, sample and compare."""
    patched = "import pdiff.method.vectors as v; v.IN_MEMORY, v.BLOCK_BYTES = 4 << 20, 4 << 20\n"
    command = [sys.executable, "-c", patched + MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 * 500_000 * 4 / 2
    assert not list(tmp_path.glob(".scratch*"))
