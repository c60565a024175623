"""Freed memory that stays with a process."""

import subprocess
import sys

import pytest

TOUCHED = """
import resource, sys
from pdiff.parallel.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch():  # two blocks of 48 MB, written page by page
    blocks = [bytearray(48 << 20) for _ in range(2)]
    for block in blocks:
        block[:: 4096] = b"x" * (len(block) // 4096)

if sys.argv[1] == "kept":
    keep_freed_memory()
touch()
before = faults()
touch()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="is about the C library of Linux")
def test_blocks_are_used_again() -> None:
    """Pages are faulted in once, where otherwise each use of a block does so."""

    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", TOUCHED, how], capture_output=True, text=True).stdout)

    kept, given_back = faults("kept"), faults("given back")
    assert given_back > 32 and kept < given_back / 10, (kept, given_back)
