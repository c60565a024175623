"""Commands in processes forked from one that has imported all libraries: they begin at once, and can be killed.

Even those that `pdiff main` imports late, and MLflow at its first run, take longer than a tiny experiment.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pdiff

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "pandas",
        "plotly.graph_objects",
        "mlflow",
        "optuna",
        "torch",
        "torchvision",
        "sklearn.datasets",
        "diffusers",
        "mlflow.store.tracking.sqlalchemy_store",
        *(module.name for module in pkgutil.walk_packages(pdiff.__path__, "pdiff.") if "__main__" not in module.name),
    ]
)


class Command:
    """A command that runs in a folder, with what `subprocess.Popen` offers; with its children it is a process group.

    It is `pdiff` with these words, or another function of the words that returns the exit code. What it prints goes to
    one file, unless errors are kept `apart`.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        environment: Mapping[str, str],
        function: tuple[str, str] = ("pdiff.cli.main", "main"),
        *,
        apart: bool = False,
    ) -> None:
        folder_of_output = Path(tempfile.mkdtemp())
        self._files = [folder_of_output / name for name in ("printed", "errors" if apart else "printed")]
        for file in self._files:
            file.touch()
        self._process = FORKSERVER.Process(target=_run, args=(folder, [*words], {**environment}, function, self._files))
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

    def communicate(self) -> tuple[str, str]:
        """Wait, and return what it has printed, and the errors among it, where they are apart."""
        self.wait()
        printed, errors = self._files
        return printed.read_text(), errors.read_text() if errors != printed else ""

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


def _run(folder: Path, words: list[str], environment: dict[str, str], function: tuple[str, str], output: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(output, 1):
        with open(name, "a") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    module, name = function
    code = getattr(importlib.import_module(module), name)(words)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
