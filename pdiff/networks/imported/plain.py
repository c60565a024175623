"""The checkpoints of other people, one state dict each, as a collection; what they are checked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.method.collection import Collection, StateDict, empty, is_generated, not_finite
from pdiff.networks.imported.files import some_checkpoints
from pdiff.networks.imported.select import SourceSelect
from pdiff.networks.imported.zoo import Checkpoint, checkpoints_in
from pdiff.networks.patterns import EVERYTHING, matching

# Threads that read. Measured with torch.load on two cores, cached files: 2 000 files of 12 kB take one thread
# 0.9 - 1.5 s, four 2.3 s, two processes 2.1 - 2.7 s; 50 files of 45 MB take one thread 0.9 - 1.3 s, four 1.0 s, two
# processes 2.5 s, and 10 s if they hand the tensors over. Threads lose a little on small files and win where a disk or
# a network answers late; processes win nowhere.
THREADS = min(8, 2 * (os.cpu_count() or 1))

T = TypeVar("T")


def read_collection(
    folder: Path,
    patterns: Sequence[str] = ("all",),
    exclude: Sequence[str] = (),
    format: str = "auto",
    select: SourceSelect | None = None,
    *,
    key: str = "prepare.source",
) -> Collection:
    """Read every checkpoint of a folder, in the order of the names, numbers in them by value.

    A large collection is put into a scratch file as it is read; tensors that are left out are not even read.

    Args:
        folder: holds .pth, .pt or .safetensors files, one state dict each; or is a zoo of another format.
        patterns: names or patterns of the tensors to read.
        exclude: names or patterns of checkpoints to leave out.
        format: a name of FORMATS, or `auto`.
        select: which of the others are used; all when absent.
        key: of the configuration that names the folder, for messages.

    Raises:
        UserError: an absent or empty folder, a damaged file, a pickle with anything but tensors in it, different
            layouts, NaN or infinity; with file and tensor. Or nothing that can be generated differs between the files.
    """
    return read_checkpoints(checkpoints_in(folder, format, exclude, select, key=key), patterns, folder, key=key)


def read_checkpoints(
    checkpoints: Sequence[Checkpoint], patterns: Sequence[str], folder: Path, *, key: str = "prepare.source"
) -> Collection:
    """As `read_collection`, of checkpoints that are listed already; `folder` stands in messages."""
    first = selected(checkpoints[0], patterns)
    collection = _stacked(checkpoints, patterns, like=first, named=str(checkpoints[0].place))
    of = "" if tuple(patterns) == EVERYTHING else f"{', '.join(patterns)} of "
    check_varying(collection.varying(), first, f"{key}: {of}the {len(checkpoints)} files in {folder}")
    return collection


def read_like(place: Path, like: StateDict, *, named: str, key: str, patterns: Sequence[str] = ("all",)) -> Collection:
    """Read a folder of checkpoint files, or a single file, whose networks have the layout of other ones.

    As `read_collection`, but one file is enough, and files may be equal.

    Args:
        place: folder or file.
        like: one of the other networks; of its numbers only shape and type matter.
        named: the file of that one, for messages.
        key: of the configuration that names the place, for messages.
        patterns: names or patterns of the tensors to read, as they were for the other networks.

    Raises:
        UserError: nothing to read, an unusable file, or another layout; with file and tensor.
    """
    return _stacked(some_checkpoints(place, key=key), patterns, like=like, named=named)


def selected(checkpoint: Checkpoint, patterns: Sequence[str]) -> StateDict:
    """The tensors of a checkpoint that match some patterns.

    Raises:
        UserError: none does, or an unusable file.
    """
    state = checkpoint.read().state
    names = matching(state, patterns)
    if not names:
        raise UserError(f"{checkpoint.place}: no tensor matches prepare.parameters {', '.join(patterns)}")
    return {name: state[name] for name in names}


def _stacked(checkpoints: Sequence[Checkpoint], patterns: Sequence[str], *, like: StateDict, named: str) -> Collection:
    """The networks in some checkpoints of one layout."""
    stacked = empty(like, len(checkpoints))

    def fill(row: int) -> None:
        state = selected(checkpoints[row], patterns)
        check_state(state, str(checkpoints[row].place), like=like, named=named)
        for name, tensor in state.items():
            stacked[name][row] = tensor

    for _ in in_threads(fill, range(len(checkpoints)), "read"):
        pass
    return Collection(stacked, [checkpoint.name for checkpoint in checkpoints])


def in_threads(function: Callable[[Any], T], items: Sequence[Any], label: str) -> Iterator[T]:
    """The results of a function in the order of the items, with a progress bar; the first exception ends all."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from tqdm(pool.map(function, items), total=len(items), desc=label, unit="file", disable=None)


def check_varying(varying: Set[str], state: StateDict, what: str) -> None:
    """Check that something can be generated from files of one layout.

    Args:
        varying: names of the tensors that differ between the files.
        state: tensors of one file; of their numbers only shape and type matter.
        what: folder and files in messages.

    Raises:
        UserError: no tensor that can be generated differs.
    """
    if not varying:
        raise UserError(f"{what} are all the same: nothing to generate")
    if not any(is_generated(name, state[name]) for name in varying):
        some = f"{', '.join(sorted(varying)[:3])}{' ...' if len(varying) > 3 else ''}"
        raise UserError(f"{what} differ only in integers or single numbers ({some}): nothing to generate")


def check_state(state: StateDict, where: str, *, like: StateDict, named: str) -> None:
    """Check that a checkpoint has the layout of another one, a tensor that can be generated, and finite numbers only.

    Args:
        state: tensors of the checkpoint.
        where: its name in messages.
        like: the checkpoint with the expected names, shapes and types.
        named: the name of that one in messages.

    Raises:
        UserError: names the first tensor that is wrong.
    """
    if different := sorted(like.keys() ^ state.keys()):
        raise UserError(f"{where}: tensors differ from those of {named}: {', '.join(different[:4])}")
    for name, tensor in state.items():
        expected = like[name]
        if tensor.shape != expected.shape:
            raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(expected.shape)} as in {named}")
        if tensor.dtype != expected.dtype:
            raise UserError(f"{where}: {name} is {tensor.dtype}, expected {expected.dtype} as in {named}")
    if not any(is_generated(name, tensor) for name, tensor in state.items()):
        raise UserError(f"{where}: no floating tensor of more than one element, so nothing can be generated")
    if name := not_finite(state):
        raise UserError(f"{where}: {name} holds NaN or infinity, expected finite numbers")
