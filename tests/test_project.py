"""What the files of the repository promise one another."""

import ast
import platform
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from pdiff.cli.app import RUNS
from pdiff.cli.main import COMMANDS
from pdiff.cli.stages import STAGES

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "pdiff").rglob("*.py"))


def repository() -> list[Path]:
    """Every file that is, or would be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def pyproject() -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_both_environments_are_the_same():
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    project = pyproject()["project"]
    assert conda["name"] == project["name"] == "pdiff"
    *names, pip = conda["dependencies"]
    assert [re.match(r"\w+", name).group() for name in names] == ["python", "pip"]
    assert pip == {"pip": project["dependencies"]}
    assert names[0] == f"python {project['requires-python']}"


def test_virtual_environments_get_the_python_of_mlflow():
    """`mlflow run --env-manager uv` would take python>=3.10, without the space, for 3.10 alone."""
    from mlflow.utils.environment import _PythonEnv

    found = _PythonEnv.from_conda_yaml(ROOT / "conda.yaml")
    assert found.python == platform.python_version() and found.dependencies == pyproject()["project"]["dependencies"]


def test_entry_points_are_those_of_the_command_line():
    commands = COMMANDS.commands
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert set(entry_points) == {name for name, command in commands.items() if command.rich_help_panel == RUNS}
    given = {"sweep": "s", "launcher": "processes", "sampler": "tpe", "align": "weights"}
    for name, entry in entry_points.items():
        words = [f"--{parameter} {{{parameter}}}" for parameter in entry.get("parameters", {})]
        assert entry["command"] == " ".join(["python -m pdiff", name, *words])
        if name in STAGES:
            assert entry["parameters"] == {"tag": "string"}
        values = " ".join(words).format_map(defaultdict(lambda: "1", given)).split()
        context = commands[name].make_context(name, values)
        for parameter in entry.get("parameters", {}):
            expected = given.get(parameter, "1")
            assert context.params[parameter] == [expected] or str(context.params[parameter]) == expected
        assert not context.args


def test_the_commands_of_the_readme_are_run_in_every_commit():
    readme, checks = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^make {target}$", checks, re.MULTILINE)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "set -e" in checks
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


@pytest.mark.slow
def test_imports_point_upwards():
    cli = pytest.importorskip("importlinter.cli")
    assert cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.slow
def test_mlflow_and_optuna_are_at_one_seam_each():
    def imports(path: Path) -> set[str]:
        """First names of all that a module imports, at once or where it needs it; not what it needs for types alone."""
        found, tree = set(), ast.parse(path.read_text())
        checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        of_types = {id(node) for block in checking for node in ast.walk(block)}
        for node in (node for node in ast.walk(tree) if id(node) not in of_types):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        return found

    assert len(MODULES) > 50
    found = {path.relative_to(ROOT / "pdiff").parts[0]: set() for path in MODULES}
    for path in MODULES:
        found[path.relative_to(ROOT / "pdiff").parts[0]] |= imports(path)
    for library, package in {"mlflow": "tracking", "optuna": "sweeps", "typer": "cli", "rich": "cli"}.items():
        assert {part for part, libraries in found.items() if library in libraries} == {package}


METHOD = """
import importlib, pkgutil, sys
import pdiff.method
assert "torch" not in sys.modules
for module in pkgutil.walk_packages(pdiff.method.__path__, "pdiff.method."):
    importlib.import_module(module.name)
names = {name.partition(".")[0] for name in sys.modules}
print(*sorted(names & {"mlflow", "optuna", "pandas", "plotly", "torchvision", "timm", "diffusers", "torch"}))
"""


@pytest.mark.slow
def test_the_method_stands_alone():
    done = subprocess.run([sys.executable, "-c", METHOD], capture_output=True, text=True)
    assert done.stdout.split() == ["torch"], done.stderr


def test_no_pickles_are_loaded():
    for path in (path for path in repository() if path.suffix == ".py"):
        text = path.read_text(encoding="utf-8")
        for forbidden in ("weights_only" + "=False", "pickle" + ".load"):
            assert forbidden not in text, path


def test_no_paths_of_one_machine():
    folders = "|".join(["work", "root", "home", "Users"])
    text_files = [path for path in repository() if b"\0" not in path.read_bytes()]
    assert len(text_files) > 30
    for path in text_files:
        found = re.search(rf"(?<![\w.~])/({folders})/\w+", path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found.group()}"
