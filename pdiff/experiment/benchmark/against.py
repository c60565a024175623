"""Another program on the same collection: whole processes, timed in turn with pdiff's own.

Run as a module, `python -m pdiff.experiment.benchmark.against FOLDER`, this is pdiff's side: it reads the folder, fits
the default generator, and samples as many networks.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tqdm.auto import tqdm

from pdiff.errors import UserError, one_line

COLLECTION = "{collection}"
OURS, THEIRS = "pdiff", "COMMAND"
OWN = [sys.executable, "-m", "pdiff.experiment.benchmark.against", COLLECTION]


class Timed(NamedTuple):
    """How long a program takes as a whole process.

    Attributes:
        program: pdiff, or COMMAND.
        seconds: the median of its repeats.
        fastest: the least of them.
        repeats: how many there were.
    """

    program: str
    seconds: float
    fastest: float
    repeats: int


def parsed(text: str) -> list[str]:
    """The words of a command, {collection} among them; it comes last where the command does not name it.

    Raises:
        UserError: quotes that do not close, or a program that does not exist.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--against {text!r}: {error}, expected a command of a shell") from None
    if not words or not shutil.which(words[0]):
        raise UserError(f"--against {text!r}: no program {words[0] if words else ''!r} is found, expected a command")
    return words if any(COLLECTION in word for word in words) else [*words, COLLECTION]


def compare(words: list[str], collection: Path, *, repeats: int) -> list[Timed]:
    """Time pdiff and a command on a folder of .pth files, in turn.

    Args:
        words: of the command, see `parsed`.
        collection: the folder.
        repeats: of either, after one that does not count, so that files are in memory.

    Raises:
        UserError: a program fails.
    """
    programs = {THEIRS: words, OURS: OWN}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in tqdm(range(repeats + 1), desc="programs", unit="round", disable=None):
        for name, command in programs.items():
            times[name].append(_seconds([word.replace(COLLECTION, str(collection)) for word in command]))
    return [Timed(name, median(found[1:]), min(found[1:]), repeats) for name, found in times.items()]


def _seconds(words: list[str]) -> float:
    """How long a process takes."""
    begin = time.perf_counter()
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"--against: {shlex.join(words)} ended with exit code {done.returncode}: {one_line(last)}")
    return time.perf_counter() - begin


def write_files(count: int, folder: Path) -> None:
    """Write networks as plain .pth files, one state dict each."""
    import torch

    from pdiff.experiment.benchmark.parts import population

    folder.mkdir(parents=True)
    for k, state in enumerate(population(count, 64)):
        torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / f"{k:05d}.pth")


def main(folder: Path) -> None:
    """Fit the default generator on a folder of files, and sample as many networks."""
    from pdiff.method.generators.base import Generator
    from pdiff.networks.imported.plain import read_collection
    from pdiff.parallel.allocator import keep_freed_memory

    keep_freed_memory()
    networks = read_collection(folder)
    Generator.fit(networks).sample(len(networks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
