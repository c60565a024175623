"""One checkpoint file of the user: its tensors, and its layout, in which other networks are written.

Files are untrusted: nothing in a pickle is loaded but tensors and plain values.
"""

from __future__ import annotations

import copy
import pickle
import re
import textwrap
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdiff import compat
from pdiff.errors import UserError
from pdiff.files import is_utf8, read_metadata, read_tensors, write_state, write_tensors, write_text
from pdiff.method.collection import StateDict

# Keys under which training scripts store the state dict. The first one present counts, so averaged weights are used
# only where there are no others.
NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema", "ema")
DEPTH = 3  # levels of nested dictionaries
PREFIXES = ("module.", "_orig_mod.")  # that DataParallel and torch.compile add to names
ZIP = b"PK\x03\x04"  # first bytes of files of torch.save since PyTorch 1.6; only those can be memory-mapped

# Of tensors of rare kinds, which are refused here with their names.
warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._utils|torch\.serialization|pdiff\.networks")


@dataclass(frozen=True)
class Template:
    """A checkpoint file that was read, and its layout, in which other networks are written.

    Attributes:
        state: its tensors, without the prefix.
        content: the dictionary that held them, as it was read, with numbers and texts beside the tensors.
        nested: from the outside to the inside, each key that the state dict is nested under, with the plain values
            beside it. What holds tensors, such as an optimiser, is left out: it belongs to another network.
        prefix: of all names, such as "module.".
        suffix: of the file, such as ".pth"; empty for a folder.
        metadata: of a safetensors file.
        file: where a network is a folder, the safetensors file in it.
        beside: where a network is a folder, the texts of its other files by their names.
    """

    state: StateDict
    content: dict[str, Any]
    nested: tuple[tuple[str, dict], ...]
    prefix: str
    suffix: str
    metadata: dict[str, str] | None
    file: str = ""
    beside: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Template:
        """Read a state dict, plain or nested under a usual key, without the prefixes of wrappers.

        Tensors may be memory-mapped: they are read when they are used, and must be copied to be kept.

        Raises:
            UserError: the file is damaged, contains code, or does not contain a state dict of ordinary tensors.
        """
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: not a readable checkpoint: expected a file, not a folder, pipe or broken link")
        if not is_utf8(path.name):  # neither PyTorch nor safetensors open it
            raise UserError(f"{path}: not a readable checkpoint: its name is not UTF-8")
        safe = path.suffix == ".safetensors"
        nested, content = _without_nesting(read_tensors(path) if safe else _load(path))
        if not isinstance(content, dict) or not content:
            raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict (name -> tensor)")
        for name, value in content.items():
            if not isinstance(name, str):
                raise UserError(f"{path}: name {name!r} is a {type(name).__name__}, expected a text")
            if not is_utf8(name):
                raise UserError(f"{path}: name {name!r} is not UTF-8")
            if not isinstance(value, Tensor) and not _is_plain(value):
                raise UserError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
        tensors = {name: value.detach() for name, value in content.items() if isinstance(value, Tensor)}
        if not tensors:
            raise UserError(f"{path}: holds no tensor, expected a state dict (name -> tensor)")
        for name, tensor in tensors.items():
            if kind := _unsupported(tensor):
                raise UserError(f"{path}: {name} is {kind}, expected ordinary numbers")
        prefix = ""
        while more := next((p for p in PREFIXES if all(name.startswith(prefix + p) for name in tensors)), ""):
            prefix += more
        state = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
        return cls(state, content, nested, prefix, path.suffix, read_metadata(path) if safe else None)

    @classmethod
    def of(cls, state: StateDict) -> Template:
        """The layout of a plain .pth file of some tensors."""
        return cls(state, dict(state), (), "", ".pth", None)

    def as_folder(self, file: str, beside: dict[str, str]) -> Template:
        """The layout of a folder with a safetensors file, as libraries of Hugging Face read it, and some texts."""
        return replace(self, nested=(), suffix="", metadata={"format": "pt"}, file=file, beside=beside)

    def complete(self, state: StateDict) -> StateDict:
        """A network with all tensors of the file: those of `state`, in the file's types, and the file's otherwise.

        Raises:
            UserError: `state` holds a tensor that the file lacks or has in another shape.
        """
        for name, tensor in state.items():
            if name not in self.state or self.state[name].shape != tensor.shape:
                expected = tuple(self.state[name].shape) if name in self.state else "no such tensor"
                raise UserError(f"{name} is {tuple(tensor.shape)}, but the checkpoint files have {expected}")
        return {name: state.get(name, tensor).to(tensor.dtype) for name, tensor in self.state.items()}

    def write(self, path: Path, state: StateDict) -> None:
        """Write a network, completed, in the layout of the file: nesting, prefix, types and values beside tensors."""
        named = {self.prefix + name: tensor.cpu().clone() for name, tensor in self.complete(state).items()}
        for name, text in self.beside.items():
            write_text(path / name, text)
        if self.file or self.suffix == ".safetensors":
            write_tensors(path / self.file, named, self.metadata)
            return
        content = copy.copy(self.content)  # with the version numbers of its modules, which load_state_dict reads
        content.update(named)
        for key, beside in reversed(self.nested):
            content = {**beside, key: content}
        write_state(path, content)


def _load(path: Path) -> Any:
    """The content of a file of torch.save; code in it is refused."""
    try:
        with path.open("rb") as file:
            mapped = file.read(len(ZIP)) == ZIP
        return torch.load(path, map_location="cpu", weights_only=True, **compat.mapped(mapped))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name and "ModelDataset" in name.group(1):
            raise UserError(
                f"{path}: a pickled data set of ModelZoos ({name.group(1)}), not unpickled; take the raw zoo instead: "
                "folders <trial>/checkpoint_<epoch>/checkpoints (format ray_tune), which holds the same networks"
            ) from None
        what = f" ({name.group(1)})" if name else ""
        raise UserError(f"{path}: holds more than tensors{what} or is damaged; pickled code is never run") from None
    except Exception as error:
        lines = str(error).splitlines() if isinstance(error, OSError | RuntimeError) else []
        reason = textwrap.shorten(lines[0], 160) if lines else f"no file of torch.save ({type(error).__name__})"
        raise UserError(f"{path}: not a readable checkpoint: {reason}") from None


def _without_nesting(content: Any) -> tuple[tuple[tuple[str, dict], ...], Any]:
    """The keys that a state dict is nested under, each with the plain values beside it; and the state dict."""
    nested = []
    for _ in range(DEPTH):
        keys = [key for key in NESTED_UNDER if isinstance(content, dict) and isinstance(content.get(key), dict)]
        if not keys:
            break
        nested.append((keys[0], {k: v for k, v in content.items() if _is_plain(v) or k == keys[0]} | {keys[0]: None}))
        content = content[keys[0]]
    return tuple(nested), content


def _is_plain(value: Any, depth: int = DEPTH) -> bool:
    """Whether a value is a number, a text, None, or a container of such with a few levels."""
    if isinstance(value, dict | list | tuple):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(item, depth - 1) for item in items)
    return value is None or isinstance(value, bool | int | float | str)


def _unsupported(tensor: Tensor) -> str:
    """The kind of a tensor that cannot be computed with; empty for all others."""
    if tensor.is_meta:
        return "a tensor without numbers (meta)"
    if type(tensor) is not Tensor or tensor.is_nested:
        return "a nested tensor" if tensor.is_nested else f"a {type(tensor).__name__}"
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return "a quantised tensor" if tensor.is_quantized else "a sparse tensor"
    if _overlaps(tensor):
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
        return f"{tensor.numel()} numbers that overlap in the {stored} that are stored"
    small = tensor.is_floating_point() and tensor.element_size() < 2
    return f"of the type {str(tensor.dtype)[6:]}" if small or tensor.is_complex() else ""


def _overlaps(tensor: Tensor) -> bool:
    """Whether numbers of a tensor share a place, as those of `expand` do: it may claim any size, whatever is stored.

    None do if, in the order of the strides, each is longer than all the shorter ones reach.
    """
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False
