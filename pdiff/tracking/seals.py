"""Seals: what is reused is as it was written. A manifest holds the checksum of every file, and the seal is its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from xxhash import xxh3_128

from pdiff.errors import Damaged
from pdiff.files import read_json, write_json

MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes that are read at a time


def checksum(path: Path) -> str:
    """The 128-bit XXH3 of the bytes of a file: it tells damage, not malice, and costs less than reading."""
    found, block = xxh3_128(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            found.update(block[:size])
    return found.hexdigest()


def seal(folder: Path, paths: Iterable[Path]) -> str:
    """Write the checksums of files, and of those in folders, into a manifest; returns the checksum of that."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    write_json(folder / MANIFEST, {file.relative_to(folder).as_posix(): checksum(file) for file in files})
    return checksum(folder / MANIFEST)


def verify(folder: Path, sealed: str) -> None:
    """Check that a folder has all files of its manifest, unchanged; `sealed` is what `seal` returned.

    Raises:
        Damaged: the first file that is missing or changed.
    """
    manifest = folder / MANIFEST
    _compare(manifest, sealed)
    for name, expected in read_json(manifest).items():
        _compare(folder / name, expected)


def _compare(path: Path, expected: str) -> None:
    try:
        found = checksum(path)
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from None
    if found != expected:
        raise Damaged(path, "is not as it was written (its checksum differs)")
