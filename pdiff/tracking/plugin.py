"""Lets `mlflow run .` work where conda is absent, and makes it end cleanly on SIGTERM.

MLflow imports this module together with `mlflow.tracking`, in every process, through the entry-point group
`mlflow.run_context_provider`. That import does three things; a fourth has an entry-point group of its own.

*A stand-in for conda.* MLflow runs a project with a `conda_env` through conda, and no setting changes that. Where
there is no conda, `MLFLOW_CONDA_HOME` is set to a folder with the two files of a conda installation that MLflow uses.
"Activating" this package's environment then puts the interpreter that runs MLflow first on PATH: the plugin exists
only where the package is installed, and so do all its dependencies. Any other environment is refused. The variable is
set at import, which serves `mlflow run` and `mlflow.projects.run` alike; the message about it is printed by the
stand-in itself, so only when a project really runs. `PDIFF_NO_CONDA_STANDIN=1` turns it off.

*A tag.* Runs created inside a project that runs through the stand-in carry `pdiff.interpreter`.

*A clean end.* On SIGTERM, `mlflow run` by itself leaves its child alive and its run RUNNING; here both end.

*One experiment.* `mlflow run` of this project logs into the MLflow experiment that `pdiff` logs into, unless its user
names another one.
"""

import atexit
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

OPT_OUT = "PDIFF_NO_CONDA_STANDIN"
IN_USE = "PDIFF_CONDA_STANDIN"  # set inside a project that runs through the stand-in
GRACE = 30.0  # seconds that a project gets after SIGTERM before it is killed

# MLflow calls `conda --help`, `conda env list --json` and `conda env create -n NAME --file FILE` ...
CONDA = """\
#!/bin/sh
case "$*" in
--help) ;;
"env list --json") echo '{"envs": []}' ;;
*)
    if ! grep -qs '^name: *pdiff *$' "$6"; then
        echo "pdiff: conda is absent, and its stand-in has no environment but pdiff's" >&2
        exit 1
    fi ;;
esac
"""

# ... then sources this and calls `conda activate NAME`, in the bash that becomes the project's command.
CONDA_SH = """\
conda() {
    echo "pdiff: conda is absent, running with $pdiff_bin/python (PDIFF_NO_CONDA_STANDIN=1 forbids it)"
    export PDIFF_CONDA_STANDIN=1 PATH="$pdiff_bin:$PATH"
}
"""


class InterpreterContext:
    """Records in the tag `pdiff.interpreter` which Python ran a project that asked for conda's.

    It is an MLflow `RunContextProvider` without inheriting from it: while this module is imported, that class is not
    yet defined.
    """

    def in_context(self) -> bool:
        """Whether this process belongs to a project that runs through the stand-in."""
        return IN_USE in os.environ

    def tags(self) -> dict[str, str]:
        """Tags of every run that is created in this process."""
        return {"pdiff.interpreter": sys.executable}


class ProjectExperiment:
    """Chooses the MLflow experiment of `mlflow run` for this project where its user chooses none.

    An MLflow `DefaultExperimentProvider`, without inheriting from it for the same reason.
    """

    def in_context(self) -> bool:
        """Whether this process is `mlflow run` of a clone of this project."""
        projects = [os.path.join(word, "MLproject") for word in sys.argv[2:]]
        texts = (Path(path).read_text(encoding="utf-8") for path in projects if os.path.isfile(path))
        ours = any(re.search(r"^name: *pdiff *$", text, re.MULTILINE) for text in texts)
        return ours and is_mlflow_run(sys.argv, sys.orig_argv)

    def get_experiment_id(self) -> str:
        """The experiment, created if it is absent."""
        import mlflow

        from pdiff.tracking.store import EXPERIMENT

        return mlflow.set_experiment(EXPERIMENT).experiment_id


def offer_standin(environ: MutableMapping[str, str]) -> None:
    """Set `MLFLOW_CONDA_HOME` to a stand-in, unless there is a conda, the user opted out, or no folder is writable."""
    # The stand-in of another virtual environment, inherited by its child processes, does not count as a conda.
    home = environ.get("MLFLOW_CONDA_HOME")
    has_home = home is not None and not Path(home).name.startswith("pdiff-conda-")
    has_conda = has_home or "CONDA_EXE" in environ or shutil.which("conda", path=environ.get("PATH"))
    if os.name != "posix" or has_conda or environ.get(OPT_OUT):
        return
    for folder in candidates(environ):
        try:
            _install(folder)
        except OSError:
            continue
        environ["MLFLOW_CONDA_HOME"] = str(folder)
        return


def candidates(environ: MutableMapping[str, str]) -> Iterator[Path]:
    """Folders that may hold the stand-in of this interpreter: one per virtual environment."""
    name = "pdiff-conda-" + hashlib.sha256(os.fsencode(sys.prefix)).hexdigest()[:12]
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    yield Path(cache, name)
    yield Path(tempfile.gettempdir(), f"{name}-{os.getuid()}")


def _install(folder: Path) -> None:
    """Write the stand-in into a folder that only this user can write to, since it will be executed.

    Raises:
        OSError: other users can write to the folder, or MLflow cannot use its name.
    """
    if not folder.is_absolute() or shlex.quote(str(folder)) != str(folder):
        raise OSError(f"{folder} must be absolute and need no quotes, since MLflow writes none")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} must belong to the current user alone")
    scripts = os.path.join(sys.prefix, "bin")  # of the virtual environment, activated or not
    _write(folder / "bin" / "conda", CONDA)
    _write(folder / "etc" / "profile.d" / "conda.sh", f"pdiff_bin={shlex.quote(scripts)}\n{CONDA_SH}")


def _write(path: Path, text: str) -> None:
    """Write an executable file, whole or not at all, unless it has this content already."""
    content = os.fsencode(text)
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.chmod(0o700)
    part.replace(path)


def is_mlflow_run(argv: list[str], orig_argv: list[str]) -> bool:
    """Whether this process is `mlflow run` or `python -m mlflow run`.

    Args:
        argv: `sys.argv`, whose first entry is no more than "-m" while a package is being imported for `python -m`.
        orig_argv: `sys.orig_argv`, which ends with the program and the same arguments.
    """
    program = orig_argv[-len(argv) :][:1]
    return argv[1:2] == ["run"] and [Path(name).name for name in program] == ["mlflow"]


def end_project(signum: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM in `mlflow run`: end all its child processes, mark its run as KILLED, exit with 143."""
    import psutil

    # Not by process group: the child shares it with the caller of `mlflow run`.
    processes = psutil.Process().children(recursive=True)
    for send in psutil.Process.terminate, psutil.Process.kill:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(process)
        _, processes = psutil.wait_procs(processes, timeout=GRACE)
    if run_id := _held_run(frame):
        atexit.register(_mark_killed, run_id)  # later: the interrupted code may be in the middle of a transaction
    # The interrupted code may also catch everything and go on; then try again.
    signal.signal(signal.SIGALRM, end_project)
    signal.alarm(1)
    atexit.register(signal.alarm, 0)
    sys.exit(128 + signal.SIGTERM)


def _held_run(frame: FrameType | None) -> str | None:
    """Id of the run that `mlflow.projects` is working on; only local variables of the interrupted code hold it."""
    while frame is not None:
        for name in "active_run", "submitted_run", "submitted_run_obj":
            if held := frame.f_locals.get(name):
                return getattr(held, "info", held).run_id
        frame = frame.f_back
    return None


def _mark_killed(run_id: str) -> None:
    """Mark a run as KILLED, unless the project has recorded already how it ended."""
    from mlflow import MlflowClient

    client = MlflowClient()
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, "KILLED")


with contextlib.suppress(OSError):  # no folder is writable
    offer_standin(os.environ)
if is_mlflow_run(sys.argv, sys.orig_argv) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, end_project)
