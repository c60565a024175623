"""The notebooks run, on small settings, and are shipped as they ran."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from forked import Command
from tracked import NAMES

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_small_settings(path, tmp_path):
    """Cells that have a `small` variant in their metadata are replaced by it; all asserts hold."""
    cells = code(read(path))
    assert any("pdiff" in cell.metadata for cell in cells)
    sources = [cell.metadata.get("pdiff", {"small": cell.source})["small"] for cell in cells]
    variables = {name: value for name, value in os.environ.items() if name not in NAMES}
    process = Command(tmp_path, sources, variables, ("cells", "run"))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert not list(FOLDER.glob("mlruns")) and not list(FOLDER.glob("*.db"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_shipped_with_its_outputs(path):
    """Executed from top to bottom, without an error; each figure also as an image."""
    cells = code(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [output.data for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert figures and all("image/png" in data for data in figures)
