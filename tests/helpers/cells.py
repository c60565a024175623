"""The cells of a notebook without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from IPython.core.interactiveshell import InteractiveShell


def run(sources: Sequence[str]) -> int:
    """Run cells one after another; an error in one ends it."""
    shell = InteractiveShell.instance()
    for source in sources:
        shell.run_cell(source).raise_error()
    return 0
