"""Names of processes that say, later and in another process, whether they are still alive."""

import os
import socket

import psutil


def this_process() -> str:
    """A name of this process that no other one gets: host, number, time of its start."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def alive(process: str) -> bool:
    """Whether a process of this host runs; those of other hosts are taken to."""
    host, pid, started = process.rsplit(":", 2)
    if host != socket.gethostname():
        return True
    try:
        found = psutil.Process(int(pid))
        return found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - float(started)) < 2
    except psutil.NoSuchProcess:
        return False
