"""Names of processes, by which another process can find out later whether they are still alive."""

import os
import socket

import psutil


def this_process() -> str:
    """The name of this process, which no other one has: host, process number, start time."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def alive(process: str) -> bool:
    """Whether a process is running; one of another host is assumed to be."""
    host, pid, started = process.rsplit(":", 2)
    if host != socket.gethostname():
        return True
    try:
        found = psutil.Process(int(pid))
        return found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - float(started)) < 2
    except psutil.NoSuchProcess:
        return False
