"""Somebody's checkpoint files as a collection. The files are untrusted: nothing is unpickled but tensors."""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pdiff import compat
from pdiff.errors import UserError
from pdiff.files import read_metadata, read_tensors, write_state, write_tensors
from pdiff.method.collection import Collection, StateDict
from pdiff.networks.populations import check_state, matching

SUFFIXES = (".pth", ".pt", ".safetensors")
# Where training scripts put the state dict; of several the first, so that averaged weights are taken where alone.
NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema", "ema")
DEPTH = 3  # dictionaries in one another, at most
PREFIXES = ("module.", "_orig_mod.")  # of networks saved under DataParallel, and under torch.compile
ZIP = b"PK\x03\x04"  # how files of torch.save begin since PyTorch 1.6; only those can be memory-mapped
# Threads that read. Measured with torch.load on two cores, cached files: 2 000 files of 12 kB take one thread
# 0.9 - 1.5 s, four 2.3 s, two processes 2.1 - 2.7 s; 50 files of 45 MB take one thread 0.9 - 1.3 s, four 1.0 s, two
# processes 2.5 s, and 10 s if they hand the tensors over. What threads lose on small files there they win where a disk
# or a network answers late; processes win nowhere.
THREADS = min(8, 2 * (os.cpu_count() or 1))

T = TypeVar("T")


def adopt(folder: Path, patterns: Sequence[str] = ("all",), exclude: Sequence[str] = ()) -> Collection:
    """Read every checkpoint file of a folder, in the order of the names, numbers in them by value.

    Needs the memory of the collection and of a few files more: tensors that are left out are not even read.

    Args:
        folder: holds .pth, .pt or .safetensors files, one state dict each.
        patterns: names or patterns of the tensors to take; the others are left out.
        exclude: names or patterns of files to leave out.

    Raises:
        UserError: an absent or empty folder, a damaged file, a pickle with anything but tensors in it, mixed layouts,
            NaN or infinity; by file and tensor.
    """
    paths = checkpoint_files(folder, exclude)
    first = _chosen(paths[0], patterns)
    check_state(first, str(paths[0]), like=first, named=str(paths[0]))
    stacked = {name: torch.empty(len(paths), *t.shape, dtype=t.dtype) for name, t in first.items()}

    def fill(row: int) -> None:
        state = _chosen(paths[row], patterns)
        check_state(state, str(paths[row]), like=first, named=str(paths[0]))
        for name, tensor in state.items():
            stacked[name][row] = tensor

    for _ in in_threads(fill, range(len(paths)), "read"):
        pass
    return Collection(stacked, [path.name for path in paths])


def in_threads(function: Callable[[Any], T], items: Sequence[Any], label: str) -> Iterator[T]:
    """The results of a function of every file, in order, with a progress bar; the first error ends all."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from tqdm(pool.map(function, items), total=len(items), desc=label, unit="file", disable=None)


def checkpoint_files(folder: Path, exclude: Sequence[str] = ()) -> list[Path]:
    """The checkpoint files of a folder by name, at least two.

    Raises:
        UserError: no folder, too few files, a name or pattern to exclude that is no file's.
    """
    if not folder.is_dir():
        raise UserError(f"prepare.source: {folder} is not a folder")
    paths = files_of(folder)
    for pattern in exclude:
        if not matching([path.name for path in paths], [pattern]):
            raise UserError(f"prepare.exclude: {pattern!r} matches none of the {len(paths)} files in {folder}")
    kept = files_of(folder, exclude)
    if len(kept) < 2:
        left = f" beside {len(paths) - len(kept)} excluded ones" if exclude else ""
        suffixes = "/".join(SUFFIXES)
        raise UserError(f"prepare.source: {folder} holds {len(kept)} files {suffixes}{left}, expected at least 2")
    return kept


def files_of(folder: Path, exclude: Sequence[str] = ()) -> list[Path]:
    """The checkpoint files that a folder holds, none where it is none, but those excluded by a name or a pattern."""
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES] if folder.is_dir() else []
    out = set(matching([path.name for path in found], exclude)) if exclude else set()
    return sorted((path for path in found if path.name not in out), key=_by_value)


def _by_value(path: Path) -> list[tuple[str, int, str]]:
    """Sorts names with numbers in them by the numbers' values, so that epoch_2 comes before epoch_10."""
    return [(text, int(digits or -1), digits) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", path.name)]


def first_file(folder: Path, exclude: Sequence[str] = ()) -> Template:
    """The first checkpoint of a folder, with its tensors that are not generated, too."""
    return Template.read(checkpoint_files(folder, exclude)[0])


def read_state(path: Path) -> StateDict:
    """The state dict of one file, plain or nested under a usual key, without the prefixes of wrappers.

    Its tensors may be mapped to the file: they are read when they are used, and must be copied to be kept.

    Raises:
        UserError: the file is damaged, holds code, or holds something else than tensors.
    """
    return Template.read(path).state


@dataclass(frozen=True)
class Template:
    """One of somebody's files, and how it is laid out: writes other networks as such files.

    Attributes:
        state: its tensors, without the prefix.
        content: the dictionary that they stood in, as it was read: numbers and texts beside the tensors included.
        nested: from the outside to the inside, each key that the state dict is nested under with what stands beside
            it, but for anything that holds tensors, such as an optimiser: that belongs to another network.
        prefix: of all names, such as "module.".
        suffix: of the file, such as ".pth".
        metadata: of a safetensors file.
    """

    state: StateDict
    content: dict[str, Any]
    nested: tuple[tuple[str, dict], ...]
    prefix: str
    suffix: str
    metadata: dict[str, str] | None

    @classmethod
    def read(cls, path: Path) -> Template:
        """Read one file; see `read_state`."""
        safe = path.suffix == ".safetensors"
        nested, content = _unpacked(read_tensors(path) if safe else _load(path))
        if not isinstance(content, dict) or not content:
            raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict (name -> tensor)")
        for name, value in content.items():
            if not isinstance(name, str):
                raise UserError(f"{path}: name {name!r} is a {type(name).__name__}, expected a text")
            if not isinstance(value, Tensor) and not _plain(value):
                raise UserError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
        tensors = {name: value.detach() for name, value in content.items() if isinstance(value, Tensor)}
        if not tensors:
            raise UserError(f"{path}: holds no tensor, expected a state dict (name -> tensor)")
        for name, tensor in tensors.items():
            if kind := _unusual(tensor):
                raise UserError(f"{path}: {name} is {kind}, expected ordinary numbers")
        prefix = _prefix(tensors)
        state = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
        return cls(state, content, nested, prefix, path.suffix, read_metadata(path) if safe else None)

    @classmethod
    def of(cls, state: StateDict) -> Template:
        """A plain .pth file of some tensors."""
        return cls(state, dict(state), (), "", ".pth", None)

    def complete(self, state: StateDict) -> StateDict:
        """A network with all tensors: those of `state`, in the file's types, and the file's own where it has none.

        Raises:
            UserError: a tensor that the file has not, or has in another shape.
        """
        for name, tensor in state.items():
            if name not in self.state or self.state[name].shape != tensor.shape:
                expected = tuple(self.state[name].shape) if name in self.state else "no such tensor"
                raise UserError(f"{name} is {tuple(tensor.shape)}, but the checkpoint files have {expected}")
        return {name: state.get(name, own).to(own.dtype) for name, own in self.state.items()}

    def write(self, path: Path, state: StateDict) -> None:
        """Write a network, completed, as the files are: nesting, prefix, types and everything that is no tensor."""
        named = {self.prefix + name: tensor.cpu().clone() for name, tensor in self.complete(state).items()}
        if self.suffix == ".safetensors":
            write_tensors(path, named, self.metadata)
            return
        content = copy.copy(self.content)  # with the version numbers of its modules, which load_state_dict reads
        content.update(named)
        for key, beside in reversed(self.nested):
            content = {**beside, key: content}
        write_state(path, content)


def _unpacked(content: Any) -> tuple[tuple[tuple[str, dict], ...], Any]:
    """The keys that a state dict is nested under, each with the plain values beside it; and the state dict."""
    nested = []
    for _ in range(DEPTH):
        keys = [key for key in NESTED_UNDER if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not keys:
            break
        nested.append((keys[0], {k: v for k, v in content.items() if _plain(v) or k == keys[0]} | {keys[0]: None}))
        content = content[keys[0]]
    return tuple(nested), content


def _plain(value: Any, depth: int = DEPTH) -> bool:
    """Whether a value is a number, a text, nothing, or a small container of such."""
    if isinstance(value, dict | list | tuple):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_plain(item, depth - 1) for item in items)
    return value is None or isinstance(value, bool | int | float | str)


def _unusual(tensor: Tensor) -> str:
    """What kind of tensor cannot be computed with; empty for all others."""
    if tensor.is_meta:
        return "a tensor without numbers (meta)"
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return "a quantised tensor" if tensor.is_quantized else "a sparse tensor"
    small = tensor.is_floating_point() and tensor.element_size() < 2
    return f"of the type {str(tensor.dtype)[6:]}" if small or tensor.is_complex() else ""


def _prefix(names: dict[str, Tensor]) -> str:
    """The prefixes of wrappers that all names begin with."""
    found = ""
    while own := next((p for p in PREFIXES if all(name.startswith(found + p) for name in names)), ""):
        found += own
    return found


def _load(path: Path) -> Any:
    """Tensors and containers of a file of torch.save; code in it is refused."""
    try:
        with path.open("rb") as file:
            mapped = file.read(len(ZIP)) == ZIP
        return torch.load(path, map_location="cpu", weights_only=True, **compat.mapped(mapped))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({name.group(1)})" if name else ""
        raise UserError(f"{path}: holds more than tensors{what} or is damaged; pickled code is never run") from None
    except Exception as error:
        told = str(error).splitlines() if isinstance(error, OSError | RuntimeError) else []
        reason = told[0] if told else f"no file of torch.save ({type(error).__name__})"
        raise UserError(f"{path}: not a readable checkpoint: {reason}") from None


def _chosen(path: Path, patterns: Sequence[str]) -> StateDict:
    """The tensors of a file that match, in its order."""
    state = read_state(path)
    chosen = {name: state[name] for name in matching(state, patterns)}
    if not chosen:
        raise UserError(f"{path}: no tensor matches prepare.parameters {', '.join(patterns)}")
    return chosen
