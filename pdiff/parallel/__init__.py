"""Data-parallel work: ranks and their shards, gradients of the global batch, spawning, liveness of processes.

May import compat and errors. `ranks` and `liveness` import no torch where there is no process group.
"""
