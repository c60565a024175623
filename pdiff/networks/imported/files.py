"""Which files of a folder are checkpoints, and their order. Nothing is read, and torch is not imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pdiff.errors import UserError
from pdiff.networks.patterns import matching

SUFFIXES = (".pth", ".pt", ".safetensors")


def files_of(folder: Path, exclude: Sequence[str] = ()) -> list[Path]:
    """The checkpoint files of a folder, without those that match `exclude`; numbers in names are sorted by value.

    Where there is no such folder there are no files.
    """
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES] if folder.is_dir() else []
    out = set(matching([path.name for path in found], exclude)) if exclude else set()

    def by_value(path: Path) -> list[tuple[str, int, str]]:
        return [(text, int(digits or -1), digits) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", path.name)]

    return sorted((path for path in found if path.name not in out), key=by_value)


def files_at(place: Path) -> list[Path]:
    """The checkpoint files of a folder, see `files_of`; or a single file."""
    return [place] if place.is_file() else files_of(place)


def some_files(place: Path, *, key: str) -> list[Path]:
    """As `files_at`, but at least one file.

    Args:
        place: a folder, or a file.
        key: of the configuration, for messages.

    Raises:
        UserError: there is no such place, or no checkpoint file.
    """
    if not place.exists():
        raise UserError(f"{key}: {place} is neither a folder nor a file")
    if (place.is_file() and place.suffix not in SUFFIXES) or not files_at(place):
        raise UserError(f"{key}: {place} holds no file {'/'.join(SUFFIXES)}")
    return files_at(place)


def checkpoint_files(folder: Path, exclude: Sequence[str] = (), *, key: str = "prepare.source") -> list[Path]:
    """As `files_of`, but at least two files.

    Args:
        folder: of the files.
        exclude: names or patterns of files to leave out.
        key: of the configuration that names the folder, for messages.

    Raises:
        UserError: there is no such folder, too few files, or a name or pattern in `exclude` that matches none.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is not a folder")
    paths = files_of(folder)
    for pattern in exclude:
        if not matching([path.name for path in paths], [pattern]):
            raise UserError(f"prepare.exclude: {pattern!r} matches none of the {len(paths)} files in {folder}")
    kept = files_of(folder, exclude)
    if len(kept) < 2:
        left = f" beside {len(paths) - len(kept)} excluded ones" if exclude else ""
        suffixes = "/".join(SUFFIXES)
        raise UserError(f"{key}: {folder} holds {len(kept)} files {suffixes}{left}, expected at least 2")
    return kept
