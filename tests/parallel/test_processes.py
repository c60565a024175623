"""Several processes as the user meets them: mistakes, kills, signals."""

from __future__ import annotations

import signal

import psutil
import pytest
import torch
from tracked import artifacts, runs, start, statuses, wait_for

from pdiff.cli.main import main as pdiff
from pdiff.files import read_tensors

pytestmark = pytest.mark.slow


@pytest.mark.thorough
def test_a_mistake_is_one_line(workspace, capfd) -> None:
    words = ["prepare", "--tag", "tiny.yaml", "--processes", "2", "--prepare.pretrain.optimizer", "sgd"]
    assert pdiff([*words, "--prepare.pretrain.learning_rate", "1e30"]) == 2
    error = capfd.readouterr().err
    assert error.count("pdiff:") == 1 and "pretrain/loss is nan" in error and "Traceback" not in error
    assert dict(statuses()) == {"prepare": "FAILED", "pretrain": "FAILED"}


def ended(children: list[psutil.Process]) -> bool:
    """Whether processes end within a few seconds."""
    return not psutil.wait_procs(children, timeout=10)[1]


def test_a_killed_run_ends_all_and_resumes_in_one(workspace) -> None:
    """kill -9 of the process that launched them, in the middle; a single one goes on."""
    longer = {"optimizer": "sgd", "learning_rate": "0.01", "epochs": "60"}
    words = ["prepare", "--tag", "tiny.yaml", "--prepare.collect.optimizer", "sgd"]
    words += [word for key, value in longer.items() for word in (f"--prepare.pretrain.{key}", value)]
    process = start(*words, "--processes", "2", PDIFF_SAVE_SECONDS="0.2")
    wait_for(lambda: list(workspace.glob(".pdiff/*/.state/pretrain.pt")), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(children) >= 2 and ended(children)
    saved = torch.load(next(workspace.glob(".pdiff/*/.state/pretrain.pt")), weights_only=True)[0]["step"]
    assert 0 < saved < 60 * 22
    assert pdiff(words) == 0
    assert [run.info.status for run in runs("prepare")] == ["KILLED", "FINISHED"]
    assert pdiff([*words, "--fresh"]) == 0
    resumed, uninterrupted = (read_tensors(artifacts(run) / "checkpoints.safetensors") for run in runs("prepare")[1:])
    for name, tensor in uninterrupted.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.thorough
def test_a_terminated_run_ends_all(workspace) -> None:
    words = ["prepare", "--tag", "tiny.yaml", "--processes", "2", "--prepare.pretrain.epochs", "100000"]
    process = start(*words, PDIFF_SAVE_SECONDS="0.2")
    wait_for(lambda: list(workspace.glob(".pdiff/*/.state/pretrain.pt")), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    printed = process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in printed and "leaked" not in printed, printed
    assert ended(children) and dict(statuses()) == {"prepare": "KILLED", "pretrain": "KILLED"}
