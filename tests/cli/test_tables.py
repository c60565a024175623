"""Tables: complete in a file or a pipe, in the width of a terminal, and always the same cells."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest

from pdiff.cli.tables import print_frame, print_table

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_table_of_the_readme(capsys) -> None:
    """Its cells, printed again, are the same text."""
    block = re.search(r"^(group +networks .*?)```", README, re.MULTILINE | re.DOTALL).group(1)
    header, *rows = [re.split(r" {2,}", line) for line in block.splitlines()]
    assert header[-1] == "median novelty" and {len(row) for row in rows} == {len(header)} and len(rows) > 3
    print_table(header, rows)
    assert capsys.readouterr().out == block


def test_numbers_are_aligned_to_the_right(capsys) -> None:
    print_table(["name", "number", "run"], [["a", "9.5 ± 0.1", "ab"], ["bcd", "–", "c"], ["e", "+10", "[red]"]])
    assert capsys.readouterr().out.splitlines() == [
        "name     number  run",
        "a     9.5 ± 0.1  ab",
        "bcd           –  c",
        "e           +10  [red]",
    ]


def test_a_file_gets_everything(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    frame = pd.DataFrame({f"column {k}": ["word " * 20, str(k)] for k in range(30)})
    print_frame(frame)
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == " ".join(frame.columns).split()
    assert first.split() == ["word"] * 600 and second.split() == list(map(str, range(30)))


def test_an_empty_table_has_its_header(capsys) -> None:
    print_table(["a", "b"], [])
    assert capsys.readouterr().out == "a  b\n"


@pytest.mark.parametrize("columns", [30, 60])
def test_a_terminal_loses_nothing(columns, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    cells = ["0123456789abcdef" * 4, "words that wrap", "93.75"]
    print_table(["run", "text", "number"], [cells])
    lines = re.sub(r"\x1b\[\d*m", "", out.getvalue()).splitlines()
    assert max(map(len, lines)) <= columns
    found = {character for line in lines[1:] for character in line}
    assert {character for cell in cells for character in cell} <= found
    assert sum(line.count("f") for line in lines) == 4
