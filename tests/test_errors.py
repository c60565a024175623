"""Exceptions as lines: what cannot be printed, what is damaged, and memory that does not suffice."""

import copy
from pathlib import Path

import pytest
import torch

from pdiff.cli.main import main
from pdiff.errors import Damaged, Failure, UserError, one_line, out_of_memory, printable


def test_strangers_names_neither_break_a_line_nor_colour_it():
    assert printable("a\nb\x1b[31m\udcff é 漢") == "a\\nb\\x1b[31m\\udcff é 漢"
    assert str(UserError("file\r\n")) == "file\\r\\n"
    assert one_line("x" * 50, 10) == "xxxxx ... xxxxx"


def test_damage_travels_between_processes():
    error = copy.copy(Damaged(Path("folder/file"), "is cut"))  # taken apart and built again as by pickle
    assert (str(error), error.path, error.exit_code) == ("folder/file: is cut", Path("folder/file"), 1)
    assert isinstance(error, Failure) and UserError("").exit_code == 2


def test_memory_that_does_not_suffice(monkeypatch, capfd):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**16)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    for error in (
        caught.value,
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
    ):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr("pdiff.experiment.config.load", fails)
        assert main(["show", "digits_mlp"]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("pdiff: out of memory: ")
