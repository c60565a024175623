"""Commands in processes forked from one that has imported the libraries: they begin at once, and can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
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


class Command:
    """A command that runs in a folder, with what `subprocess.Popen` offers; with its children it is a process group."""

    def __init__(self, folder: Path, words: Sequence[str], environment: Mapping[str, str]) -> None:
        file, name = tempfile.mkstemp()
        os.close(file)
        self._output = Path(name)
        self._process = FORKSERVER.Process(target=_run, args=(folder, [*words], {**environment}, name))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait, for some seconds at most; then the exit code, or nothing where it still runs."""
        self._process.join(timeout)
        return self.returncode

    def communicate(self) -> tuple[str, None]:
        """Wait, and return what it has printed."""
        self.wait()
        return self._output.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill_group(self) -> bool:
        """Kill it with its children, and say whether it had not ended before."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or has ended
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL


def _run(folder: Path, words: list[str], environment: dict[str, str], output: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    from pdiff.cli.main import main

    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
