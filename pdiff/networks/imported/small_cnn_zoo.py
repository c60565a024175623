"""The Small CNN Zoo (Unterthiner et al. 2020, arXiv 2002.11448): a matrix with a network in each row; no torch to list.

`weights.npy` (rows, numbers); `metrics.csv.gz`, a line for each row, of which those with one `modeldir` come from one
training; `layout.csv`, a line for each tensor: `varname`, `start_idx`, `end_idx` (not included), `shape`. TensorFlow's
kernels are given in PyTorch's order: (height, width, in, out) as (out, in, height, width), (in, out) as (out, in).
"""

from __future__ import annotations

import ast
import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pdiff.errors import UserError, one_line
from pdiff.networks.imported.zoo import Checkpoint, plain_values

if TYPE_CHECKING:
    import numpy as np

    from pdiff.networks.imported.template import Template

METRICS, LAYOUT, MATRIX = "metrics.csv.gz", "layout.csv", "weights.npy"
INTEGER = re.compile(r"[+-]?\d{1,18}")
ORDER = {4: (3, 2, 0, 1), 2: (1, 0)}  # of the dimensions of a kernel


class Columns(NamedTuple):
    """Which columns of the matrix are a tensor."""

    name: str
    start: int
    end: int
    shape: tuple[int, ...]


def detects(folder: Path) -> bool:
    """Whether a folder holds metrics and layout."""
    return (folder / METRICS).is_file() and (folder / LAYOUT).is_file()


def checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Every row of the matrix.

    Raises:
        UserError: a file that cannot be read, a layout that does not cover the matrix, or metrics of other rows.
    """
    matrix = _matrix(folder)
    layout = _layout(folder / LAYOUT, matrix)
    files, count = (folder / METRICS, folder / LAYOUT, folder / MATRIX), 0
    for row, known in enumerate(_metrics(folder / METRICS)):
        if (count := row + 1) > len(matrix):
            break
        name = f"row_{row:06d}"
        yield Checkpoint(name, folder / name, partial(_read, matrix, row, layout), files, known)
    if count != len(matrix):
        more = "more" if count > len(matrix) else f"only {count}"
        raise UserError(f"{folder / METRICS}: has {more} rows, expected {len(matrix)} as in {MATRIX}")


def _matrix(folder: Path) -> np.ndarray:
    """The matrix, mapped to memory; pickled objects are refused."""
    import numpy as np

    path = folder / MATRIX
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable NumPy matrix: {one_line(str(error), 160)}") from None
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype not in ("<f2", "<f4", "<f8"):
        kind = f"{matrix.dtype} {matrix.shape}" if isinstance(matrix, np.ndarray) else "an archive"
        raise UserError(f"{path}: holds {kind}, expected floating numbers (rows, numbers)")
    return matrix


def _layout(path: Path, matrix: np.ndarray) -> list[Columns]:
    """The tensors, which must cover the columns of the matrix, each once."""
    layout: list[Columns] = []
    for number, line in enumerate(_lines(path), start=2):
        try:
            shape = ast.literal_eval(line["shape"][:100])
            shape = (shape,) if isinstance(shape, int) else tuple(shape)
            columns = Columns(line["varname"], int(line["start_idx"]), int(line["end_idx"]), shape)
            if not columns.name or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError("expected a name and a shape of positive integers")
        except (KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
            reason = f"column {error} is missing" if isinstance(error, KeyError) else one_line(str(error), 100)
            raise UserError(f"{path}, line {number}: not a tensor of the layout: {reason}") from None
        if prod(shape) != columns.end - columns.start:
            size = f"{columns.start} .. {columns.end}"
            raise UserError(f"{path}, line {number}: {columns.name} {shape} does not fill the columns {size}")
        layout.append(columns)
    at = 0
    for columns in sorted(layout, key=lambda columns: columns.start):
        if columns.start != at:
            raise UserError(
                f"{path}: {columns.name} begins with column {columns.start}, expected {at}: no gap, no overlap"
            )
        at = columns.end
    if at != matrix.shape[1]:
        raise UserError(f"{path}: covers {at} columns, but the rows of {MATRIX} have {matrix.shape[1]}")
    if len({columns.name for columns in layout}) < len(layout):
        raise UserError(f"{path}: two tensors have one name")
    return layout


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    """What is known of every row."""
    for number, line in enumerate(_lines(path), start=2):
        values = plain_values({name: _value(text) for name, text in line.items() if name})
        network, step = values.pop("modeldir", None), values.pop("step", None)
        if network is None or not isinstance(step, int):
            raise UserError(
                f"{path}, line {number}: expected a modeldir and an integer step, got {network!r}, {step!r}"
            )
        yield {"network": str(network), "step": step, **values}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a CSV file, by the names of its columns."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                if None in line or None in line.values():
                    raise csv.Error("a line has more or fewer values than there are columns")
                yield line
    except (OSError, EOFError, zlib.error, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table: {one_line(str(error), 160)}") from None


def _value(text: str) -> Any:
    """A cell as a number, or else as text."""
    if INTEGER.fullmatch(text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _read(matrix: np.ndarray, row: int, layout: list[Columns]) -> Template:
    import torch

    from pdiff.networks.imported.template import Template

    numbers = torch.from_numpy(matrix[row].copy())
    state = {}
    for name, start, end, shape in layout:
        tensor = numbers[start:end].view(shape)
        order = ORDER.get(len(shape)) if "kernel" in name else None
        state[name] = tensor.permute(order).contiguous() if order else tensor
    return Template.of(state)
