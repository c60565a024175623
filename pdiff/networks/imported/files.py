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


def checkpoint_files(folder: Path, exclude: Sequence[str] = ()) -> list[Path]:
    """As `files_of`, but at least two files.

    Raises:
        UserError: there is no such folder, too few files, or a name or pattern in `exclude` that matches none.
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
