"""Run the notebooks again, in place and two at a time; `make notebooks` calls this."""

from __future__ import annotations

from multiprocessing.pool import ThreadPool
from pathlib import Path

import nbformat
from nbclient import NotebookClient

BAR = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> None:
    """Run a notebook, and keep what its cells show, without progress bars and times."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, record_timing=False, store_widget_state=False, resources=folder).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if BAR not in output.get("data", {})]
    nbformat.write(notebook, path)
    print(path.name, flush=True)


if __name__ == "__main__":
    with ThreadPool(2) as pool:  # the longest first
        pool.map(execute, sorted(Path(__file__).parent.glob("*.ipynb"), reverse=True), chunksize=1)
