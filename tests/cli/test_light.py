"""Commands that answer at once: they do not import torch, and take little longer than what they need."""

import os
import shlex
import subprocess
import sys
import time

import pytest

from pdiff.cli.main import main

PROGRAM = """
import shlex, sys
from pdiff.cli.main import main
for line in sys.argv[1:]:
    code = main(shlex.split(line))
    print("|", line, "|", code, "|", *sorted({"torch", "timm", "plotly"} & set(sys.modules)), file=sys.stderr)
"""
LIGHT = {
    "--help": 0,
    "main --help": 0,
    "--version": 0,
    "show cifar100_resnet18 --network.architecture resnet18.a1_in1k": 0,
    "tags": 0,
    "studies": 0,
    "show nothing": 2,
    "main --tag nothing": 2,
    "main --tag digits_mlp --diffusion.stepz 3": 2,
    "main --tag digits_mlp --diffusion.steps many": 2,
    "main --tag digits_mlp --dataset.name digit": 2,
    "main --tag digits_mlp --generate.count 10000000000000": 2,
    "sweep --tag digits_mlp --sweep optimizer --generate.count 10000000000000": 2,
    "main --tag digits_mlp --network.architecture resnet81": 2,
    "main --tag digits_mlp --network.architecture resnet18.none_in1k": 2,
    "main --tag digits_mlp --network.architecture absent.py:net": 2,
    "train --tag digits_mlp again": 2,
    "sweep --tag nothing --sweep layers": 2,
    "sweep --tag digits_mlp --sweep nothing": 2,
    "memory nothing": 2,
    "new digits_mlp --checkpoints .": 2,
    "new mine --checkpoints absent": 2,
    "audit --originals absent --generated absent": 2,
    "audit --originals . --generated .=. --dataset digits": 2,
    "new mine --checkpoints . --function absent.py:predict": 2,
    "new mine --checkpoints . --dataset digit --architecture mlp": 2,
    "new mine --checkpoints . --diffusion.stepz 3": 2,
    "export --run": 2,
}


def finished(*lines: str) -> dict[str, tuple[int, list[str]]]:
    """Run some commands in one process: command -> its exit code, and which heavy libraries are imported after it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *lines], capture_output=True, text=True)
    rows = [row.split("|") for row in done.stderr.splitlines() if row.startswith("| ")]
    found = {line.strip(): (int(code), heavy.split()) for _, line, code, heavy in rows}
    assert list(found) == list(lines), done.stderr
    return found


@pytest.fixture(autouse=True)
def new_machine(empty_workspace, monkeypatch):
    """A folder without runs, on a machine where nothing is cached."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{empty_workspace}/mlflow.db")


@pytest.mark.slow
def test_without_torch():
    assert finished(*LIGHT) == {line: (code, []) for line, code in LIGHT.items()}


@pytest.mark.slow
def test_what_reads_runs_is_without_torch():
    """A `main` of which everything is finished, and what shows results."""
    assert main(["main", "--tag", "tiny.yaml"]) == 0
    lines = {"main --tag tiny.yaml": 0, "compare": 0, "export --run none --out out": 2, "leaderboard tiny": 0}
    plotted = {"leaderboard tiny": ["plotly"]}
    assert finished(*lines) == {line: (code, plotted.get(line, [])) for line, code in lines.items()}


@pytest.mark.slow
def test_completion_is_without_torch():
    asked = {"_PDIFF_COMPLETE": "complete_bash", "COMP_WORDS": "pdiff show digits_m", "COMP_CWORD": "2"}
    command = [sys.executable, "-X", "importtime", "-m", "pdiff"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["digits_mlp", "digits_mlp_paper"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pdiff.experiment.config" in imported and not imported & {"torch", "timm", "mlflow", "optuna", "pandas"}


def seconds(*arguments: str) -> float:
    """How long Python takes with some arguments, the best of three."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True)
        return time.perf_counter() - start

    return min(once() for _ in range(3))


@pytest.mark.slow
def test_the_library_is_imported_when_it_is_used():
    program = "import sys, pdiff; pdiff.Gaussian(), pdiff.runs; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"torch", "timm", "mlflow", "optuna", "pandas"}, done.stderr
    program = "import sys; before = set(sys.modules); import pdiff; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names) == {"pdiff"}
    assert seconds("-c", "import pdiff") - seconds("-c", "pass") < 0.2


@pytest.mark.slow
def test_answers_at_once():
    """Within five times what importing pydantic, yaml and pandas takes."""
    least = seconds("-c", "import pydantic, yaml, pandas")
    lines = ("show digits_mlp", "tags", "studies", "main --tag nothing")
    taken = {line: seconds("-m", "pdiff", *shlex.split(line)) for line in lines}
    assert max(taken.values()) < 5 * least, taken
