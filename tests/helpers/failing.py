"""A rank that fails; in a module of its own, since every process that is launched imports it."""

import os
import signal

from pdiff.errors import UserError
from pdiff.parallel.ranks import rank, summed, world


def fail(how: str, *, log) -> None:
    """The last process ends; the others wait for it."""
    if rank() < world() - 1:
        summed(1.0)
    if how == "mistake":
        raise UserError("one line")
    os.kill(os.getpid(), signal.SIGKILL)
