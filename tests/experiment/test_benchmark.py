"""The benchmark: what it counts against closed forms, exponents of known powers, the page, the command."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tracked import runs

from pdiff.cli.main import main
from pdiff.errors import UserError
from pdiff.experiment.benchmark import PARTS, SIZES, against, chosen, scaling
from pdiff.experiment.benchmark.measure import Cost, Peaks, Work, operations_of, peak_memory
from pdiff.experiment.benchmark.page import Found
from pdiff.experiment.benchmark.scaling import Point
from pdiff.method.options import resolve
from pdiff.networks.imported.plain import read_collection
from pdiff.parallel.allocator import keep_freed_memory

CPU = torch.device("cpu")
SMALL = replace(SIZES["quick"], networks=8)


def operations(part, tmp_path):
    return operations_of(resolve(PARTS[part].make)(SMALL, CPU, tmp_path).call)


def autoencoder_operations(size, latent_size, rows):
    """Forward, and twice as much backward, but for the gradient of the input; 7 taps for each pair of channels."""
    length = size + -size % 64
    down = [length // 2 ** (k + 1) * a * b for k, (a, b) in enumerate([(1, 64), (64, 128), (128, 256), (256, 256)])]
    down.append(length // 32 * 256 * 32)
    ups = [(32, 256), (256, 256), (256, 128), (128, 64), (64, 64)]
    up = [length // 32 * 2**k * a * b for k, (a, b) in enumerate(ups)]
    convolutions = 3 * sum(down) + 3 * sum(up) + 3 * length * 64 - down[0]
    linear = 2 * latent_size * length // 32 * 32 + latent_size**2
    return 2 * rows * (7 * convolutions + 3 * linear)


@pytest.mark.slow
def test_operations_are_those_of_the_formulas(tmp_path):
    size = 32 * SMALL.inputs + 362
    assert operations("paper_autoencoder", tmp_path) == autoencoder_operations(size, SMALL.latent_size, 50)
    assert operations("similarity", tmp_path) == 2 * 8 * 8 * 10_000
    assert operations("distances", tmp_path) == 2 * 8 * (8 + 2) * size  # inner products, and both norms
    a, total = torch.ones(3, 5, 7), torch.zeros(3, 5, 5)
    assert operations_of(lambda: total.baddbmm_(a, a.mT)) == 2 * 3 * 5 * 7 * 5


@pytest.mark.slow
def test_every_part_runs_and_moves_bytes(tmp_path):
    for name in (name for name in PARTS if name not in ("paper_autoencoder", "seeds")):
        work = resolve(PARTS[name].make)(SMALL, CPU, tmp_path)
        work.call()
        assert work.units > 0 and work.bytes > 0, name


@pytest.mark.slow
def test_seeds_are_trained_again_at_every_call(tmp_path):
    work = resolve(PARTS["seeds"].make)(SMALL, CPU, tmp_path)
    least = 2 * 64 * 3 * (64 * 32 + 32 * 10) - 2 * 64 * 64 * 32  # a step of a network on 64 images
    for _ in range(2):
        assert operations_of(work.call) >= work.units * least


def test_exponents_of_known_powers():
    assert scaling.exponent([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2)
    points = [Point("pca", "N", 7, n, 5.0 if n < 4 else 1e-3 * n**1.5) for n in (1, 2, 4, 8, 16)]
    assert scaling.exponents(points) == {("pca", "N"): pytest.approx(1.5)}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is set back by Linux alone")
def test_peak_memory_is_that_of_the_block():
    keep_freed_memory()
    torch.ones(32 << 20)  # 128 MB, given back before the block
    with peak_memory(CPU) as peak:
        torch.ones(16 << 20)
    assert peak[0] == pytest.approx(64 << 20, rel=0.1)


def found():
    costs = {"similarity": (Work(lambda: None, 4, 300.0), Cost(2.0, 1.0, 3, 2**20, 80.0))}
    points = [Point("pca", over, n, n, n**2.0) for over in ("D", "N") for n in (1, 2, 4)]
    timed = [against.Timed(name, 2.0, 1.0, 3) for name in (against.OURS, against.THEIRS)]
    return Found("<a machine>", Peaks(100.0, 1000.0, 10.0), costs, points, scaling.exponents(points), timed)


def test_shares_are_of_the_scarcer_resource():
    (row,) = found().parts().to_dict("records")
    assert row["bound"] == "gemm" and row["share"] == pytest.approx(0.8)  # 80 operations at 100 a second in 1 s
    assert row["seconds"] == 0.5 and row["operations"] == 20 and row["bytes"] == 75
    metrics = found().metrics()
    assert metrics["share/similarity"] == pytest.approx(0.8) and metrics["exponent/pca_D"] == pytest.approx(2)
    assert Peaks(1, 2, 3).least_seconds(2, 9, disk=True) == {"gemm": 2, "disk": 3}


def test_the_page_is_self_contained():
    page = found().html()
    assert "&lt;a machine&gt;" in page and "<a machine>" not in page
    assert 'src="http' not in page and "<link" not in page
    for heading in ("Parts", "Machine", "Growth with D", "Growth with N", "Programs"):
        assert f"<h2>{heading}</h2>" in page
    assert "| pca | 1 | 4 | 16 | 2.00 |" in found().markdown()


def test_mistakes(tmp_path, capsys):
    assert chosen("") == [*PARTS, "scaling"] and chosen("load, distances load") == ["load", "distances"]
    for line, message in {
        "--parts distance": "--parts distance: no such part; did you mean distances?",
        "--quick --full": "--quick --full: expected one of them",
        "--against no-such-program": "no program 'no-such-program' is found",
        "--against '": "No closing quotation",
    }.items():
        words = line.split()
        assert main(["benchmark", *words]) == 2
        assert message in capsys.readouterr().err
    against.write_files(2, tmp_path / "files")
    with pytest.raises(UserError, match="exit code 3: nothing works"):
        failing = "import sys; print('nothing works', file=sys.stderr); sys.exit(3)"
        against.compare([sys.executable, "-c", failing, against.COLLECTION], tmp_path / "files", repeats=1)


@pytest.mark.slow
def test_a_benchmark_is_a_run(workspace, capsys, monkeypatch):
    monkeypatch.setattr(against, "OWN", [sys.executable, "-c", "import time; time.sleep(1)"])
    counting = f"{sys.executable} -c 'import os, sys; sys.exit(len(os.listdir(sys.argv[1])) != 20)' {{collection}}"
    parts = "fast_pca,distances,similarity,scaling"
    assert main(["benchmark", "--parts", parts, "--against", counting, "--quick", "true"]) == 0
    printed = capsys.readouterr().out
    (run,) = runs("benchmark")
    metrics = run.data.metrics
    assert 0 < metrics["share/fast_pca"] < 1 and metrics["peak/gemm"] > 1e9 and "exponent/alignment_N" in metrics
    assert metrics["seconds/program_pdiff"] > 1 and metrics["seconds/program_command"] > 0
    assert run.data.params["benchmark.sizes"] == "quick" and f"run        {run.info.run_id}" in printed
    page = Path(printed.split("page ")[1].strip())
    assert "<h2>Programs</h2>" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_programs_take_turns(tmp_path, monkeypatch):
    against.write_files(3, tmp_path / "files")
    assert len(read_collection(tmp_path / "files")) == 3
    write = "import sys; open({log!r}, 'a').write({name!r} + str(sys.argv[1:]))"
    log = str(tmp_path / "log")
    ours, theirs = ([sys.executable, "-c", write.format(log=log, name=name)] for name in ("ours", "theirs"))
    monkeypatch.setattr(against, "OWN", [*ours, against.COLLECTION])
    timed = against.compare([*theirs, "--in={collection}"], tmp_path / "files", repeats=2)
    place = tmp_path / "files"
    assert Path(log).read_text() == f"theirs['--in={place}']ours['{place}']" * 3
    assert {t.program for t in timed} == {"pdiff", "COMMAND"} and all(t.seconds >= t.fastest > 0 for t in timed)


@pytest.mark.slow
def test_the_program_of_pdiff_works(tmp_path):
    against.write_files(3, tmp_path / "files")
    against.main(tmp_path / "files")
