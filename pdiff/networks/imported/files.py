"""Plain folders: a checkpoint in every file .pth, .pt or .safetensors. Nothing is read, and torch is not imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pdiff.errors import UserError
from pdiff.networks.imported.zoo import Checkpoint, by_value, listed

if TYPE_CHECKING:
    from pdiff.networks.imported.template import Template

SUFFIXES = (".pth", ".pt", ".safetensors")


def detects(folder: Path) -> bool:
    """Whether a folder may be a plain one: what is not another format is."""
    return True


def checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoint files of a folder, see `files_of`."""
    return checkpoints_of(files_of(folder))


def checkpoints_of(files: Iterable[Path]) -> Iterator[Checkpoint]:
    """Checkpoint files as checkpoints."""
    return (Checkpoint(path.name, path, partial(_read, path), (path,)) for path in files)


def _read(path: Path) -> Template:
    from pdiff.networks.imported.template import Template

    return Template.read(path)


def files_of(folder: Path) -> list[Path]:
    """The checkpoint files of a folder; numbers in names are sorted by value.

    Where there is no such folder there are no files.
    """
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES] if folder.is_dir() else []
    return sorted(found, key=lambda path: by_value(path.name))


def checkpoints_at(place: Path) -> list[Checkpoint]:
    """The checkpoints of a folder, in any format; or a single file."""
    return list(checkpoints_of([place])) if place.is_file() else listed(place)


def some_checkpoints(place: Path, *, key: str) -> list[Checkpoint]:
    """The checkpoints of a folder, in any format; or a single file.

    Args:
        place: a folder, or a file.
        key: of the configuration, for messages.

    Raises:
        UserError: there is no such place, or no checkpoint.
    """
    if not place.exists():
        raise UserError(f"{key}: {place} is neither a folder nor a file")
    found = checkpoints_at(place)
    if not found or (place.is_file() and place.suffix not in SUFFIXES):
        raise UserError(f"{key}: {place} holds no file {'/'.join(SUFFIXES)}")
    return found
