"""A first hour: the commands of that section of the README run as they stand there, on small sizes."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from pdiff.cli.main import main
from pdiff.sweeps import schema

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCK = README.partition("\n## A first hour\n")[2].split("```")[1]
LINES = [line.partition("#")[0].strip() for line in BLOCK.strip().splitlines()]

EVALUATION = "--evaluate.noise 0.05 --evaluate.baselines average --evaluate.baseline_count 4"
FIT = (
    "--log_models false --diffusion.steps 50 --diffusion.width 32 --diffusion.blocks 1 --generate.count 8 " + EVALUATION
)
TRAINING = f"--prepare.pretrain.epochs 2 --prepare.collect.checkpoints 20 {FIT}"
SIZES = {
    "main --tag digits_mlp": TRAINING,
    "main --tag my_digits": FIT,
    "sweep": f"--trials 1 --launcher inline {TRAINING}",
    "audit": EVALUATION,
}
"""Beginning of a command -> what is added to it."""


@contextmanager
def serving(command: list[str]):
    """Run `mlflow ui` on a free port; yields its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", *command, "--port", str(port), "--workers", "1"]
    with open("ui.log", "wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as server:
        try:
            end = time.monotonic() + 120
            while True:
                assert server.poll() is None and time.monotonic() < end, Path("ui.log").read_text()
                try:
                    yield requests.get(f"http://127.0.0.1:{port}/health").url.removesuffix("/health")
                    return
                except requests.ConnectionError:
                    time.sleep(0.2)
        finally:
            server.terminate()


@pytest.mark.slow
def test_its_commands_run_one_after_another(workspace, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    small = Path("experiments/sweeps/latent_noise_timesteps.yaml")  # a file of the current folder comes first
    small.parent.mkdir(parents=True)
    small.write_text(f"{schema.sweeps()[small.stem].read_text()}final: {{seeds: 1}}\n")
    activation, *commands = LINES
    assert activation == ". .venv/bin/activate"
    printed: dict[str, str] = {}
    run_id = address = ""
    for command in commands:
        command = re.sub(r"\bID\b", run_id, command)
        program, *words = shlex.split(command)
        if program == "mlflow":
            with serving([program, *words]) as server:
                experiment, view = re.search(r"/#/experiments/(\d+)/runs\?viewStateShareKey=(\w+)", address).groups()
                asked = f"{server}/ajax-api/2.0/mlflow/experiments/get?experiment_id={experiment}"
                tags = {tag["key"] for tag in requests.get(asked).json()["experiment"]["tags"]}
                assert f"mlflow.sharedViewState.{view}" in tags
            continue
        more = next((more for name, more in SIZES.items() if shlex.join(words).startswith(name)), "")
        assert main([*words, *shlex.split(more)]) == 0, capsys.readouterr().err
        printed[command] = capsys.readouterr().out
        if words[0] == "main":
            run_id = re.search(r"^run +(\w+)$", printed[command], re.MULTILINE).group(1)
            address = re.search(r"http\S+$", printed[command], re.MULTILINE).group()

    assert {word.split()[1] for word in printed} == {"main", "compare", "sweep", "export", "new", "audit"}
    again, smaller = (text for command, text in printed.items() if "--tag digits_mlp" in command and "main" in command)
    assert "reusing" not in again and smaller.count("reusing") == 3  # of pretrain, prepare and originals
    assert len(printed["pdiff compare"].splitlines()) == 3
    assert "New, or copied?" in list(printed.values())[-1]
