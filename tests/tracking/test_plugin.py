"""Runs a tiny project with the real `mlflow run`, in an environment without conda and without an activated Python."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pdiff.tracking import plugin
from pdiff.tracking.plugin import InterpreterContext, is_mlflow_run, offer_standin

ROOT = Path(__file__).parents[2]
PYTHON = os.path.join(sys.prefix, "bin", "python")
MLPROJECT = """
name: tiny
conda_env: conda.yaml
entry_points:
  main: {command: python main.py}
  wait: {command: "true && python wait.py && true"}
"""
CONDA_YAML = "name: pdiff\ndependencies: [python, pip]\n"
MAIN = """
import sys, mlflow
print(sys.executable)
with mlflow.start_run(), mlflow.start_run(nested=True, run_name="inner"):
    pass
"""
WAIT = """
import os, pathlib, time
pathlib.Path("part").write_text(str(os.getpid()))
os.replace("part", "pid")
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(
    shutil.which("conda", path=os.defpath) is not None, reason="there is a conda in a system folder"
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that needs nothing but Python."""
    for name, text in {"MLproject": MLPROJECT, "conda.yaml": CONDA_YAML, "main.py": MAIN, "wait.py": WAIT}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment that knows neither conda nor this virtual environment."""
    return {
        "PATH": os.defpath,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }


def mlflow_run(project: Path, environ: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """Start `mlflow run` for the project."""
    command = [PYTHON, "-m", "mlflow", "run", ".", *options]
    return subprocess.Popen(
        command, cwd=project, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def runs(environ: dict[str, str]) -> list[Run]:
    """All runs in the project's store, oldest first."""
    return MlflowClient(environ["MLFLOW_TRACKING_URI"]).search_runs(["0"], order_by=["attributes.start_time"])


@pytest.mark.slow
def test_project_runs_without_conda_in_the_same_interpreter(project: Path, environ: dict[str, str]) -> None:
    process = mlflow_run(project, environ)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines() == [PYTHON]
    assert err.count("pdiff: conda is absent") == 1
    outer, inner = runs(environ)
    assert outer.info.status == inner.info.status == "FINISHED"
    assert inner.data.tags["pdiff.interpreter"] == PYTHON


@pytest.mark.slow
def test_opt_out(project: Path, environ: dict[str, str]) -> None:
    process = mlflow_run(project, environ | {plugin.OPT_OUT: "1"})
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Could not find Conda executable" in err


@pytest.mark.slow
def test_sigterm_ends_the_project_and_its_run(project: Path, environ: dict[str, str]) -> None:
    process = mlflow_run(project, environ, "-e", "wait")
    deadline = time.monotonic() + 120
    while not (project / "pid").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not psutil.pid_exists(int((project / "pid").read_text()))
    assert [run.info.status for run in runs(environ)] == ["KILLED"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("pdiff", [], "pdiff"), ("pdiff", ["--experiment-name", "mine"], "mine"), ("other", [], "Default")],
)
def test_the_project_logs_where_the_command_does(
    project: Path, environ: dict[str, str], tmp_path: Path, name: str, options: list[str], expected: str
) -> None:
    (project / "MLproject").write_text(MLPROJECT.replace("name: tiny", f"name: {name}"))
    installed = tmp_path / "installed"
    metadata = installed / "pdiff-1.0.dist-info"  # what `pip install` makes of pyproject.toml
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pdiff\nVersion: 1.0\n")
    declared = re.findall(r'entry-points\."([\w.]+)"\]\n(.*?)\n\n', (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    (metadata / "entry_points.txt").write_text("".join(f"[{g}]\n{lines}\n" for g, lines in declared).replace('"', ""))
    process = mlflow_run(project, environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}, *options)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    client = MlflowClient(environ["MLFLOW_TRACKING_URI"])
    found = {e.name: len(client.search_runs([e.experiment_id])) for e in client.search_experiments()}
    assert {name: count for name, count in found.items() if count} == {expected: 2}


@pytest.mark.parametrize("conda", [{"MLFLOW_CONDA_HOME": "/opt/conda"}, {"CONDA_EXE": "/opt/conda/bin/conda"}])
def test_a_conda_of_the_user_is_left_alone(environ: dict[str, str], conda: dict[str, str]) -> None:
    before = environ | conda
    after = before.copy()
    offer_standin(after)
    assert after == before


def test_conda_on_path_is_left_alone(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "conda").touch(mode=0o755)
    environ["PATH"] = str(tmp_path)
    offer_standin(environ)
    assert "MLFLOW_CONDA_HOME" not in environ


def test_another_interpreters_standin_is_replaced(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    offer_standin(environ)
    first = environ["MLFLOW_CONDA_HOME"]
    monkeypatch.setattr(sys, "prefix", "/another")
    offer_standin(environ)
    assert environ["MLFLOW_CONDA_HOME"] != first


@pytest.mark.parametrize("spoil", ["space", "shared", "file"])
def test_unsafe_folder_is_not_used(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    monkeypatch.setattr(plugin.tempfile, "tempdir", str(tmp_path / "temporary"))
    cache = tmp_path / ("a folder" if spoil == "space" else "folder")
    environ["XDG_CACHE_HOME"] = str(cache)
    if spoil == "file":
        cache.touch()
    if spoil == "shared":
        folder = next(plugin.candidates(environ))
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    offer_standin(environ)
    assert Path(environ["MLFLOW_CONDA_HOME"]).parent == tmp_path / "temporary"


def test_standin_refuses_other_environments(environ: dict[str, str], tmp_path: Path) -> None:
    offer_standin(environ)
    conda = Path(environ["MLFLOW_CONDA_HOME"], "bin", "conda")
    file = tmp_path / "conda.yaml"
    for name, code in {"pdiff": 0, "pdiff-other": 1, "mlflow-env": 1}.items():
        file.write_text(f"name: {name}\n")
        command = [conda, "env", "create", "-n", "mlflow-1", "--file", file]
        assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == code


def test_tag_is_only_set_inside_a_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.IN_USE, raising=False)
    assert not InterpreterContext().in_context()
    monkeypatch.setenv(plugin.IN_USE, "1")
    assert InterpreterContext().in_context()
    assert InterpreterContext().tags() == {"pdiff.interpreter": sys.executable}


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/venv/bin/mlflow", "run", "."], ["python", "/venv/bin/mlflow", "run", "."], True),
        (["-m", "run", "."], ["python", "-u", "-m", "mlflow", "run", "."], True),
        (["/venv/bin/mlflow", "ui"], ["python", "/venv/bin/mlflow", "ui"], False),
        (["-m", "run"], ["python", "-m", "another", "run"], False),
        (["main.py"], ["python", "main.py"], False),
        ([""], ["python"], False),
        (["set", "run", "by", "hand"], ["python"], False),
    ],
)
def test_is_mlflow_run(argv: list[str], orig_argv: list[str], expected: bool) -> None:
    assert is_mlflow_run(argv, orig_argv) is expected
