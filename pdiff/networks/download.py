"""Files of torchvision's data sets: downloaded if they are absent and that is allowed; damaged ones are refused."""

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
    """Read the parts of a torchvision data set; download it first if it is absent, allowed and reachable.

    Args:
        kind: class of the data set.
        root: folder that holds it.
        files: name below `root` -> MD5 sum, or "" where none is published; files with another sum are not read.
        download: whether that is allowed.
        parts: the argument of the class that selects the part, and its values for training and test.

    Raises:
        UserError: files are absent and were not downloaded, or are damaged.
    """

    def read(download: bool) -> list:
        return [kind(root, **{key: value}, download=download) for key, values in parts.items() for value in values]

    def absent() -> list[str]:
        return [name for name in files if not (root / name).exists()]

    reason = "dataset.download is false"
    if download and (absent() or (root / LOCK).exists()):  # another process may be writing a file
        reason = _download(root, lambda: absent() and read(True))
    if missing := absent():
        raise UserError(f"not there, and {reason}; put {', '.join(missing)} into that folder")
    try:
        return read(False)
    except Exception as error:  # a damaged file may raise anything
        changed = [name for name, md5 in files.items() if md5 and calculate_md5(root / name) != md5]
        if changed:
            raise UserError(f"{changed[0]} is damaged, or another file: its MD5 sum is not the published one") from None
        raise UserError(f"one of {', '.join(files)} is damaged: {line(error)}") from None


def _download(root: Path, download: Callable[[], Any]) -> str:
    """Download, one process at a time. Returns why files are absent, should they still be."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / LOCK), _timeout():
            download()
    except Exception as error:
        return f"the download failed ({line(error)})"
    return "the download lacks it"


def line(error: Exception) -> str:
    """The message of an exception on one line; torchvision's have several."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _timeout() -> Iterator[None]:
    """A time limit on sockets that do not answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
