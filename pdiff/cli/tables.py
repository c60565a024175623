"""Tables on the terminal: as wide as it is; in a file or a pipe complete, plain, a line for each row."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

NUMBER = re.compile(r"[-+–±.,%()>\d ]*")  # 95.42, 2 048, 94.34 ± 0.99, 76.72 -> 77.24, –
WIDEST = 1 << 14


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, name in enumerate(header):
        numbers = rows and all(NUMBER.fullmatch(row[column]) for row in rows)
        table.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        console.width = WIDEST
        with console.capture() as captured:
            console.print(table)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def print_frame(frame: pd.DataFrame) -> None:
    """Print a data frame of texts and whole numbers, without its index."""
    print_table(list(frame.columns), frame.astype(str).to_numpy().tolist())
