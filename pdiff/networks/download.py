"""Files of torchvision's data sets: downloaded where they are absent and that is allowed, refused where damaged."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from torchvision.datasets.utils import calculate_md5

from pdiff.errors import UserError

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer
LOCK = ".download.lock"


def fetch(kind: Callable, root: Path, files: Mapping[str, str], download: bool, **parts: tuple) -> list:
    """Read a torchvision data set; download it where it is absent, allowed and reachable.

    Args:
        kind: its class.
        root: the folder that holds it.
        files: name below `root` -> MD5 sum, or "" where none is published; files of another sum are not read.
        download: whether that is allowed.
        parts: the argument of the class that tells training from test, and its values.
    """

    def read(download: bool) -> list:
        return [kind(root, **{key: value}, download=download) for key, values in parts.items() for value in values]

    def absent() -> list[str]:
        return [name for name in files if not (root / name).exists()]

    reason = "dataset.download is false"
    if download and (absent() or (root / LOCK).exists()):  # then a file may be half-written by another process
        reason = _download(root, lambda: absent() and read(True))
    if missing := absent():
        raise UserError(f"not there, and {reason}; put {', '.join(missing)} into that folder")
    try:
        return read(False)
    except Exception as error:  # whatever a damaged file leads to
        changed = [name for name, md5 in files.items() if md5 and calculate_md5(root / name) != md5]
        if changed:
            raise UserError(f"{changed[0]} is damaged, or another file: its MD5 sum is not the published one") from None
        raise UserError(f"one of {', '.join(files)} is damaged: {line(error)}") from None


def _download(root: Path, download: Callable[[], Any]) -> str:
    """Download, one process at a time; what went wrong if files are still absent."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / LOCK), _timeout():
            download()
    except Exception as error:
        return f"the download failed ({line(error)})"
    return "the download lacks it"


def line(error: Exception) -> str:
    """An error on one line; torchvision's name what was tried on several."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _timeout() -> Iterator[None]:
    """A time limit on sockets that say nothing."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
