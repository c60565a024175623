"""The notebooks run, on small settings, and are shipped as they ran."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_small_settings(path, tmp_path, monkeypatch):
    """Cells that have a `small` variant in their metadata are replaced by it; all asserts hold."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    notebook = read(path)
    small = [cell for cell in code(notebook) if "pdiff" in cell.metadata]
    assert small
    for cell in small:
        cell.source = cell.metadata["pdiff"]["small"]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
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
