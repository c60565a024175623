"""Files that appear whole or not at all; in a process group rank 0 alone writes them.

JSON, text and safetensors. torch is imported where a file holds tensors, and nowhere else. Tensors of files are mapped
to memory: they are read where they are used, and need no memory of their own.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from tqdm.auto import tqdm

from pdiff.errors import Damaged
from pdiff.parallel.interrupts import uninterrupted
from pdiff.parallel.ranks import rank_zero_only

if TYPE_CHECKING:
    from torch import Tensor

SQLITE_SECONDS = 60.0  # to wait for another process that writes to an SQLite database
LOCK_SECONDS = 60  # for which a database may be made by another process
SCRATCH_BYTES = 16 << 20  # of tensors that are made together, from which on `scratch` puts them into a file
SCRATCH_ALIGNMENT = 64  # bytes, of the beginnings of tensors in such a file
SCRATCH_FOLDER: ContextVar[Path | None] = ContextVar("SCRATCH_FOLDER", default=None)
"""Where `scratch` puts its files; None: the folder of the system's temporary files."""
TYPES = {
    **{"bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16"},
    **{"bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32", "complex64": "C64"},
    **{"float64": "F64", "int64": "I64", "uint64": "U64"},
}
"""Names of types in safetensors files, in the order of that library, which sorts by them: the last ones come first."""
UMASK = os.umask(0)
os.umask(UMASK)


def is_utf8(name: str) -> bool:
    """Whether a name can be written to a text file or a database: bytes that are not UTF-8 become lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    It gets the permissions of an ordinary new file, however it was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.chmod(0o666 & ~UMASK)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_database(path: Path, make: Callable[[Path], object], is_complete: Callable[[Path], bool]) -> None:
    """Make an SQLite database, whole or not at all, unless a complete one is there; of several processes one does it.

    What is there instead, as a killed process leaves it, is kept under another name, `<name>.damaged-1` or higher.
    Interrupts wait: libraries that make databases take them for errors of their own, or lose them.

    Args:
        path: of the database.
        make: makes one at a path where there is nothing, and closes it.
        is_complete: whether there is one at a path that may be used; raises where it may not be replaced either.
    """
    with uninterrupted():
        if is_complete(path):
            return
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock, timeout=LOCK_SECONDS), uninterrupted():
        if not is_complete(path):
            for leftover in path.parent.glob(f".{path.name}.*.tmp*"):
                leftover.unlink()
            with whole(path) as new:
                make(new)
                _move_aside(path)
        lock.unlink(missing_ok=True)  # those who wait for it, and those who make it anew, will find a complete database


def use_write_ahead_log(path: Path) -> None:
    """Let others read an SQLite database while one process writes to it."""
    with closing(sqlite3.connect(path, timeout=SQLITE_SECONDS)) as database:
        database.execute("PRAGMA journal_mode=WAL")


def _move_aside(path: Path) -> None:
    """Rename an SQLite database with its journals; it comes last: what is left without them is no more complete."""
    taken = [place.name for place in path.parent.iterdir()]
    free = (f"{path.name}.damaged-{number}" for number in itertools.count(1))
    aside = next(name for name in free if not any(other.startswith(name) for other in taken))
    for suffix in ("-wal", "-shm", "-journal", ""):
        if f"{path.name}{suffix}" in taken:
            os.replace(f"{path}{suffix}", path.with_name(f"{aside}{suffix}"))
    if path.name in taken:
        tqdm.write(f"warning: {path} was not made to its end, and holds nothing; it is now {aside}")


@rank_zero_only
def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with whole(target) as temporary:
        shutil.copyfile(source, temporary)


@rank_zero_only
def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@rank_zero_only
def append_line(path: Path, line: str) -> None:
    """Add a line to a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def whole_lines(path: Path) -> list[Any]:
    """The JSON values of a file of `append_line`; none where there is no file.

    An incomplete last line, as a killed process leaves it, is cut off, so that the next one does not continue it.

    Raises:
        Damaged: a line that is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        write_text(path, "".join(lines[:-1]))
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise Damaged(path, f"not readable lines of JSON: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@rank_zero_only
def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, without a copy of the tensors in memory."""
    with new_tensors(path, tensors, metadata) as written:
        for name, tensor in tensors.items():
            written[name].copy_(tensor.detach())


@contextmanager
def new_tensors(
    path: Path, like: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """A new safetensors file whose tensors the block fills; it appears when the block ends without an error.

    Args:
        path: of the file.
        like: tensors of the shapes and types that it will have; their numbers do not matter.
        metadata: of the file.

    Yields:
        Its tensors by name, mapped to memory.

    Raises:
        OSError: the disk has no room for it.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    order = list(TYPES)
    for name, tensor in sorted(like.items(), key=lambda item: (-order.index(str(item[1].dtype)[6:]), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = TYPES[str(tensor.dtype)[6:]]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    with whole(path) as temporary:
        try:
            with temporary.open("w+b") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.flush()
                numbers = _mapped(file.fileno(), temporary, first + end)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
        places = {name: slice(*(first + k for k in header[name]["data_offsets"])) for name in like}
        yield {name: numbers[places[name]].view(t.dtype).view(t.shape) for name, t in like.items()}


def scratch(*shape: int) -> Tensor:
    """An uninitialised tensor, float32, see `scratch_tensors`."""
    import torch

    return scratch_tensors({"": torch.empty(shape, device="meta")})[""]


def scratch_tensors(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Uninitialised tensors on the CPU; of SCRATCH_BYTES or more together, in a file that ends with them.

    The file is mapped to memory, so that the system can write its pages to the disk where memory is short.

    Args:
        like: tensors of the shapes and types that they will have; their numbers do not matter.

    Raises:
        OSError: the disk has no room for them.
    """
    import torch

    sizes = [tensor.numel() * tensor.element_size() for tensor in like.values()]
    ends = list(itertools.accumulate(-(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT for size in sizes))
    if not ends or ends[-1] < SCRATCH_BYTES:
        return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
    if folder := SCRATCH_FOLDER.get():
        folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder, prefix=".scratch-") as file:
        numbers = _mapped(file.fileno(), Path(file.name), ends[-1])
    places = {name: slice(start, start + size) for name, start, size in zip(like, [0, *ends], sizes, strict=False)}
    return {name: numbers[places[name]].view(t.dtype).view(t.shape) for name, t in like.items()}


@contextmanager
def scratch_folder(folder: Path) -> Iterator[None]:
    """Let `scratch` put its files into a folder, which it makes when there are any."""
    token = SCRATCH_FOLDER.set(folder)
    try:
        yield
    finally:
        SCRATCH_FOLDER.reset(token)


def _mapped(descriptor: int, path: Path, size: int) -> Tensor:
    """The bytes of a file of `size` bytes, uint8 (size,), mapped to memory.

    The room on the disk is taken at once: a page that does not fit when it is written ends the process by a signal.
    """
    import torch

    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        for start in range(os.fstat(descriptor).st_size, size, 1 << 20):
            os.pwrite(descriptor, bytes(min(1 << 20, size - start)), start)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(str(path), True, size))


@rank_zero_only
def write_state(path: Path, state: Any) -> None:
    """Write tensors in containers as `torch.save` does, whole or not at all."""
    import torch

    with whole(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # a full disk, most of the time
            raise OSError(f"{path} cannot be written: {error}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        Damaged: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(path, f"not a readable JSON file: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: its tensors are mapped to memory, and what is written into them stays in this process.

    Raises:
        Damaged: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Damaged(path, f"not a readable safetensors file: {error}") from None


def read_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file that `read_tensors` reads, if it has any."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
