"""Hostile tries: a bad input, the exit code that it must end with, and what the one line must say."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pdiff.cli.main import main

LONGEST = 700  # characters of a line that one still reads


class Try(NamedTuple):
    """A command (without `pdiff`), its exit code, the words of its line, and what is put into the folder before."""

    command: str
    code: int
    says: tuple[str, ...]
    before: Callable[[Path], object] = lambda folder: None


def answered(tried: Try, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Check that a try ends with one line, that says what it must, and with nothing of anybody else on stderr."""
    tried.before(folder)
    capfd.readouterr()
    assert main(shlex.split(tried.command)) == tried.code
    printed = capfd.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("pdiff: ")]
    assert len(lines) == 1 and len(lines[0]) < LONGEST, printed.err
    assert not [word for word in tried.says if word not in lines[0]], lines[0]
    assert "Traceback" not in printed.out + printed.err and "\r" not in printed.err
