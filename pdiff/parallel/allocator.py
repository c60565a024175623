"""How the C library of Linux (glibc) keeps memory that is freed."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
KEPT = 1 << 26  # bytes of a block below which it is kept
MOST = 1 << 30  # bytes that are kept at the end of memory


def keep_freed_memory() -> None:
    """Let freed blocks of less than KEPT bytes, up to MOST in all, stay with this process for the next ones.

    By default glibc gives memory back when 64 MB at its end are free, and the next activations cost a page fault every
    4 KB: a fifth of a training step of the paper's autoencoder on a CPU. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries have no such function
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_THRESHOLD, KEPT)
            mallopt(TRIM_THRESHOLD, MOST)


def give_back_freed_memory() -> None:
    """Give freed blocks back to the system once, so that what is resident is what is used."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
