"""Hostile tries: sizes that no machine has, and files of strangers."""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hostile import Try, answered
from safetensors.torch import load_file
from tracked import artifacts, runs, statuses

from pdiff.cli.main import main
from pdiff.experiment import config, limits
from pdiff.networks.imported.plain import read_collection

LARGE, HUGE = 10**13, 10**400
NEW, PREPARE = "new mine --checkpoints mine", "prepare --tag mine.yaml"
MINE = "prepare: {source: mine}\ndiffusion: {steps: 2, width: 4, blocks: 1}\ngenerate: {count: 2, sampling_steps: 2}\n"

Put = Callable[[Path], object]


# -- sizes


def size(key: str, value: int, stage: str, *more: str, command: str = "main --tag tiny.yaml", unit: str = "B") -> Try:
    needed = (f"{key} {str(value)[:40]}", f"{stage} needs at least", unit, "memory", "this machine has")
    return Try(f"{command} --{key} {value} {' '.join(more)}", 2, needed)


CONV = ("--autoencoder.kind", "conv")
SIZES = [
    size("generate.count", LARGE, "generate", unit="80.0 TB"),  # names of 8 bytes
    size("generate.count", HUGE, "generate"),
    size("generate.count", LARGE, "generate", command="generate --tag tiny.yaml"),
    size("generate.count", LARGE, "generate", "--trials 1", command="sweep --tag tiny.yaml --sweep optimizer"),
    size("generate.count", 10**16, "generate", command="main --tag mine.yaml"),
    size("diffusion.width", 10**8, "train"),
    size("diffusion.blocks", 10**13, "train"),
    size("diffusion.timesteps", LARGE, "generate"),
    size("diffusion.timesteps", LARGE, "train", "--diffusion.prediction epsilon", command="train --tag tiny.yaml"),
    size("diffusion.batch_size", LARGE, "train"),
    size("autoencoder.latent_size", 10**10, "train", *CONV),
    size("autoencoder.batch_size", LARGE, "train", "--autoencoder.latent_size 4", *CONV),
    size("autoencoder.latent_size", 10**10, "train", "--diffusion.denoiser conv", *CONV),
    size("prepare.collect.checkpoints", LARGE, "prepare", command="prepare --tag tiny.yaml"),
    size("prepare.collect.batch_size", LARGE, "prepare"),
    size("prepare.pretrain.batch_size", LARGE, "pretrain"),
    size("generator.checkpoints", LARGE, "train", f"--prepare.collect.checkpoints {LARGE}"),
]


@pytest.mark.parametrize("tried", SIZES, ids=lambda tried: tried.command[:80])
def test_sizes_are_refused_before_anything_is_begun(tried, workspace, capfd):
    (workspace / "mine.yaml").write_text(MINE)
    (workspace / "mine").mkdir()
    before = {path.name for path in workspace.iterdir()}
    answered(tried, workspace, capfd)
    assert {path.name for path in workspace.iterdir()} == before


@pytest.mark.slow
def test_what_is_known_once_files_are_read_is_refused_before_its_stage(workspace, capfd, monkeypatch):
    """15 numbers of 2 bytes for each of 10^6 networks, twice, on a disk of 20 MB; before, the 15 are not known."""
    disk = shutil.disk_usage(workspace)._replace(total=20 * 10**6, free=20 * 10**6)
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: disk)
    needed = ("generate.count 1000000: generate needs at least", "MB of disk, but")
    put = beside("b.pth", lambda path: torch.save(good(9), path), count=4)
    answered(Try("generate --tag mine.yaml --generate.count 1000000", 2, needed, put), workspace, capfd)
    assert dict(statuses()) == {"prepare": "FINISHED", "train": "FINISHED", "generate": "FAILED"}
    assert not [path for path in (workspace / ".pdiff").iterdir() if path.is_dir()]


# -- files

GOOD = {"w": torch.ones(3, 4), "b": torch.ones(3)}


def good(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 4, generator=g), "b": torch.randn(3, generator=g)}


def beside(name: str, put: Put, *, count: int = 1) -> Put:
    """A folder `mine` with some good files and another one, and an experiment of it."""

    def put_all(folder: Path) -> None:
        (folder / "mine").mkdir()
        for k in range(count):
            torch.save(good(k), folder / "mine" / f"a{k}.pth")
        put(folder / "mine" / name)
        (folder / "mine.yaml").write_text(MINE)

    return put_all


def bad(name: str, put: Put, *says: str) -> Try:
    """A folder in which one of two files cannot be used."""
    return Try(NEW, 2, ("holds 1 usable checkpoint files", *says), beside(name, put))


def saved(**tensors: object) -> Put:
    return lambda path: torch.save(GOOD | tensors, path)


def old(**tensors: object) -> Put:
    return lambda path: torch.save(GOOD | tensors, path, _use_new_zipfile_serialization=False)


class View:
    """A tensor of three numbers that claims another shape."""

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self.claim = offset, shape, stride

    def __reduce__(self) -> tuple:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.ones(3).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (storage, *self.claim, False, {})


def header(content: Mapping | bytes, data: bytes = b"", *, length: int | None = None) -> Put:
    """A safetensors file with a header as written, of the length that it says or another one."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def floats(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def sparse_file(path: Path) -> None:
    """A header of 100 MB, nearly all of which is a hole."""
    path.write_bytes(struct.pack("<Q", 10**8 + 1) + b"{")
    os.truncate(path, 10**8 + 9)


def cut(path: Path) -> None:
    torch.save(good(1), path)
    path.write_bytes(path.read_bytes()[:200])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("archive/data.pkl", b"nothing")


QUANTISED = torch._empty_affine_quantized([3], scale=1.0, zero_point=0, dtype=torch.quint8)
ODD = os.fsdecode(b"\xff\x1b[31m.pth")
SAFE, PTH = "not a readable safetensors file", "not a readable checkpoint"
FILES = [
    bad("x.pth", saved(b=torch.ones(1).expand(10**12)), "b is 1000000000000 numbers that overlap in the 1"),
    bad("x.pth", old(b=torch.ones(1).expand(10**12)), "b is 1000000000000 numbers that overlap in the 1"),
    bad("x.pth", saved(w=torch.ones(100).as_strided((3, 4), (1, 1))), "w is 12 numbers that overlap in the 100"),
    bad("x.pth", saved(b=View((10**9,), (1,))), "x.pth", PTH),
    bad("x.pth", old(b=View((10**13,), (1,))), "x.pth", PTH),
    bad("x.pth", saved(b=View((-3,), (1,))), "x.pth", PTH),
    bad("x.pth", saved(b=View((3,), (-1,))), "x.pth", PTH),
    bad("x.pth", saved(b=View((2**62, 2**62), (1, 1))), "x.pth", PTH),
    bad("x.pth", saved(b=View((3,), (1,), 10**9)), "x.pth", PTH),
    bad("x.pth", saved(b=torch.ones(3, device="meta")), "b is a tensor without numbers (meta)"),
    bad("x.pth", saved(w=torch.eye(3).to_sparse_csr()), "w is a sparse tensor"),
    bad("x.pth", saved(b=torch.ones(3).to_sparse()), "b is a sparse tensor"),
    bad("x.pth", saved(b=QUANTISED), "b is a quantised tensor"),
    bad("x.pth", saved(b=torch.ones(3, dtype=torch.complex64)), "b is of the type complex64"),
    bad("x.pth", saved(b=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "b is a nested tensor"),
    bad("x.pth", saved(**{"\ud800": torch.ones(3)}), r"'\ud800' is not UTF-8"),
    bad("x.pth", cut, "x.pth", PTH),
    bad("x.pth", other_zip, "x.pth", PTH),
    bad("x.pth", lambda path: path.write_bytes(b"PK\x03\x04"), "x.pth", PTH),
    bad("x.pth", lambda path: path.touch(), "x.pth is empty"),
    bad("x.pth", lambda path: path.mkdir(), "x.pth", PTH, "not a folder"),
    bad("x.pth", os.mkfifo, "x.pth", PTH, "pipe"),
    bad("x.pth", lambda path: path.symlink_to("/dev/zero"), "x.pth", PTH),
    bad("x.pth", lambda path: path.symlink_to("x.pth"), "x.pth cannot be read"),
    bad(ODD, saved(), r"\udcff\x1b[31m.pth", "its name is not UTF-8"),
    bad("a\n\x1b[31m.pth", lambda path: path.write_text("no"), r"a\n\x1b[31m.pth holds more than"),
    bad("x.safetensors", lambda path: path.touch(), "x.safetensors is empty"),
    bad("x.safetensors", header({}, length=10**12), "x.safetensors", SAFE),
    bad("x.safetensors", sparse_file, "x.safetensors", SAFE),
    bad("x.safetensors", header(b"[" * 10**5), "x.safetensors", SAFE),
    bad("x.safetensors", header(b"\xff\xfe"), "x.safetensors", SAFE),
    bad("x.safetensors", header({"w": floats([10**12], 0, 4 * 10**12)}, bytes(8)), SAFE),
    bad("x.safetensors", header({"w": floats([2**40, 2**40], 0, 8)}, bytes(8)), SAFE),
    bad("x.safetensors", header({"w": floats([-2], 0, 8)}, bytes(8)), SAFE),
    bad("x.safetensors", header({"w": floats([2], 0, 8), "b": floats([2], 4, 12)}, bytes(12)), SAFE),
    bad("x.safetensors", header({"w": floats([2], 0, 8, "F99")}, bytes(8)), SAFE),
    Try(NEW, 2, ("2 files in mine are all the same",), beside("a1.pth", lambda path: torch.save(good(0), path))),
    Try(
        NEW,
        2,
        ("2 files in mine differ only in integers or single numbers (n, t)", "nothing to generate"),
        lambda folder: [
            (folder / "mine").mkdir(),
            *(torch.save({"n": torch.tensor(k), "t": torch.ones(1) * k}, folder / f"mine/{k}.pth") for k in range(2)),
        ],
    ),
    Try(
        PREPARE,
        2,
        ("prepare.source: the 2 files in mine are all the same",),
        beside("a1.pth", lambda path: torch.save(good(0), path)),
    ),
    Try(
        f"{PREPARE} --prepare.parameters b",
        2,
        ("b of the 2 files in mine are all the same",),
        beside("a1.pth", lambda path: torch.save(good(1) | {"b": good(0)["b"]}, path)),
    ),
    Try(PREPARE, 2, ("x.pth", "b is 1000000000000 numbers"), beside("x.pth", saved(b=torch.ones(1).expand(10**12)))),
    Try(PREPARE, 2, ("x.pth", "broken link"), beside("x.pth", lambda path: path.symlink_to("absent"))),
    Try(f"new mine --checkpoints {ODD}", 2, (r"\udcff", "not UTF-8"), lambda folder: (folder / ODD).mkdir()),
    Try(f"{PREPARE} --prepare.source {ODD}", 2, (r"\udcff", "not UTF-8"), beside("x.pth", saved())),
    Try("memory tiny.yaml --diffusion.width 1000000000000", 2, ("diffusion.width", "too much to be counted")),
    Try(f"memory tiny.yaml --generate.batch_size {10**21} --generate.count {10**21}", 2, ("generate.batch_size",)),
    Try(PREPARE, 2, ("x.pth", "pipe"), beside("x.pth", os.mkfifo)),
    Try(PREPARE, 2, (r"\udcff\x1b[31m.pth", "not UTF-8"), beside(ODD, saved())),
    Try(
        f"{NEW} --dataset digits --architecture mlp",
        2,
        ("--architecture mlp with --dataset digits", "w is (3, 4) in the files, absent in the network", "nothing was"),
        beside("a1.pth", lambda path: torch.save(good(1), path)),
    ),
    Try(
        f"{NEW} --dataset digits --architecture cnn_medium",
        2,
        ("cnn_medium",),
        beside("a1.pth", lambda path: torch.save(good(1), path)),
    ),
    Try(
        f"{NEW} --dataset image_folder --architecture mlp --dataset.root absent",
        2,
        ("image_folder", "absent", "not there"),
        beside("a1.pth", lambda path: torch.save(good(1), path)),
    ),
]


@pytest.mark.parametrize("tried", FILES, ids=lambda tried: f"{tried.command} {tried.says}")
def test_files_of_strangers(tried, workspace, capfd):
    answered(tried, workspace, capfd)
    assert not (workspace / "experiments").exists() and not list(workspace.glob(".pdiff/*/*"))


def test_odd_names_reach_neither_the_terminal_nor_the_yaml_raw(workspace, capfd):
    odd = "a\n\x1b[31mred"
    (workspace / "mine").mkdir()
    for k in range(3):
        constant = {"constant": torch.ones(2), "\x1b[2J": torch.ones(3)}
        torch.save({odd: torch.randn(2), **constant}, workspace / "mine" / ("é.pth", "0.pth", f"{odd}1.pth")[k])
    for name in (ODD, os.fsdecode(b"\xff.pth")):
        saved()(workspace / "mine" / name)
    torch.save({"other": torch.ones(2)}, workspace / "mine" / f"{odd}.pth")
    assert main(shlex.split(NEW)) == 0
    printed = capfd.readouterr()
    assert "\x1b" not in printed.out + printed.err and r"a\n\x1b[31mred" in printed.out
    assert r"\udcff\x1b[31m.pth: not a readable checkpoint: its name is not UTF-8" in printed.out
    experiment = config.load("mine")
    settings = experiment.prepare
    collection = read_collection(Path(settings.source), settings.parameters, settings.exclude)
    assert collection.names == ["0.pth", f"{odd}1.pth", "é.pth"] and set(collection.tensors) == {odd}


@pytest.mark.slow
def test_nothing_but_the_line_is_on_stderr(workspace):
    """In a process of its own, where warnings of libraries are printed."""
    beside("x.pth", saved(w=torch.eye(3).to_sparse_csr()))(workspace)
    done = subprocess.run([sys.executable, "-m", "pdiff", *shlex.split(NEW)], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch("pdiff: .*x.pth w is a sparse tensor.*\n", done.stderr)


# -- what is done otherwise than asked


def warnings_of(capfd: pytest.CaptureFixture[str]) -> list[str]:
    printed = capfd.readouterr()
    return [line for line in (printed.out + printed.err).splitlines() if line.startswith("warning: ")]


@pytest.mark.slow
def test_fewer_latents_than_asked_for(workspace, capfd):
    assert main(shlex.split("train --tag tiny.yaml --autoencoder.latent_size 5000")) == 0
    (run,) = runs("train")
    used = len(load_file(artifacts(run) / "generator" / "generator.safetensors")["latent_mean"])
    (line,) = warnings_of(capfd)
    assert line.startswith(f"warning: autoencoder.latent_size 5000: {used} are used") and used < 20
    assert run.data.metrics["latent_size"] == used and run.data.params["config.autoencoder.latent_size"] == "5000"
    assert main(shlex.split("train --tag tiny.yaml --autoencoder.latent_size 5")) == 0
    assert not warnings_of(capfd)


@pytest.mark.slow
def test_copies_of_one_network(workspace, capfd):
    one = "--generator.checkpoints 1 --diffusion.heldout_fraction 0 --diffusion.stop_on none"
    assert main(shlex.split(f"generate --tag tiny.yaml {one}")) == 0
    (line,) = warnings_of(capfd)
    assert line.startswith("warning: the generator is fitted on the 1 checkpoint: every network")
    sampled = load_file(artifacts(runs("generate")[0]) / "generated.safetensors")
    assert all(torch.equal(rows[0], row) for rows in sampled.values() for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "file"), {"prepare": "checkpoints", "generate": "generated"}.items())
def test_networks_that_were_deleted(workspace, capfd, stage, file):
    assert main(shlex.split("generate --tag tiny.yaml")) == 0
    (run,) = runs(stage)
    export = f"export --run {run.info.run_id} --out out"
    path = artifacts(run) / f"{file}.safetensors"
    index = path.with_suffix(".json").read_text()
    path.with_suffix(".json").write_text(index.replace("float32", "float64"))
    answered(Try(export, 1, (str(path.with_suffix(".json")), "not as it was written")), workspace, capfd)
    path.with_suffix(".json").write_text(index)
    path.unlink()
    answered(Try(export, 1, (f"{path}: ", "No such file", f"`pdiff {stage} --tag tiny --fresh`")), workspace, capfd)
    answered(Try(f"export --run {runs('pretrain')[0].info.run_id} --out out", 2, ("pretrain",)), workspace, capfd)
    assert not Path("out").exists()


@pytest.mark.slow
def test_nothing_to_measure_the_networks(workspace, capfd):
    beside("b.pth", lambda path: torch.save(good(9), path), count=4)(workspace)
    assert main(shlex.split("main --tag mine.yaml")) == 0
    printed = capfd.readouterr().out
    assert "no accuracy: there is no data set, and neither evaluate.function nor evaluate.command" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert "–" not in printed and any(row[:2] == ["generated", "2"] and float(row[2]) > 0 for row in rows if row)
