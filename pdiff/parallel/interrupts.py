"""Interrupts (SIGINT, SIGTERM) that wait for what must not be left half-done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block ends.

    For short blocks that break where they are interrupted: a transaction leaves its database locked, and the import of
    a library in C++, such as torch, aborts the process.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main one
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in held:
            signal.raise_signal(number)
