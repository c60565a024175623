"""Commands in processes forked from one that has imported the libraries: they begin at once, and can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "pandas",
        "plotly.graph_objects",
        "mlflow",
        "optuna",
        "torch",
        "torchvision",
        "pdiff.cli.main",
        "pdiff.tracking.store",
    ]
)


def _run(folder: Path, words: list[str], environment: dict[str, str]) -> None:
    os.setsid()  # with its children it is a process group
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open("output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    from pdiff.cli.main import main

    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def begin(folder: Path, words: list[str], environment: dict[str, str]) -> BaseProcess:
    """Start a command in a folder, where its output goes to the file `output.txt`."""
    process = FORKSERVER.Process(target=_run, args=(folder, words, environment))
    process.start()
    return process


def kill(process: BaseProcess) -> bool:
    """Kill a process with its group, and say whether it had not ended before."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet, or has ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL
