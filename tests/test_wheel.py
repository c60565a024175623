"""What is installed is complete: a wheel, unpacked, is pdiff with its experiments."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pdiff

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "mlruns", "mlartifacts", "*.db", "__pycache__")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what is in the wheel; built from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, "."]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"pdiff-{pdiff.__version__}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow
def test_everything_is_there(installed):
    def files(folder: Path, *patterns: str) -> set[str]:
        return {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)}

    everything = ("**/*.py", "py.typed", "**/templates/*")
    assert files(installed / "pdiff", *everything) == files(ROOT / "pdiff", *everything)
    experiments = ("**/*.yaml", "*.csv")
    found = files(installed / "pdiff" / "experiments", *experiments)
    assert found == files(ROOT / "experiments", *experiments) and len(found) > 100
    size = sum(path.stat().st_size for path in installed.rglob("*") if path.is_file())
    assert size < 3e6, "no pictures"


@pytest.mark.slow
def test_it_runs_in_an_empty_folder(installed, tmp_path):
    def printed(*arguments: str) -> str:
        variables = {**os.environ, "PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        folder = tmp_path / "empty"
        folder.mkdir(exist_ok=True)
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout

    assert printed("-m", "pdiff", "--version") == f"pdiff {pdiff.__version__}\n"
    assert "tag: digits_mlp\n" in printed("-m", "pdiff", "show", "digits_mlp")
    rows = [line.split() for line in printed("-m", "pdiff", "tags").splitlines()]
    assert len(rows) > 80 and ["offline", "digits_mlp", "digits", "mlp", "2", "410", "-"] in rows
    program = "import pdiff; from pdiff.sweeps.schema import sweeps; print(pdiff.__file__, *sweeps())"
    file, *sweeps = printed("-c", program).split()
    assert Path(file).parent == installed / "pdiff" and "latent_noise_timesteps" in sweeps
