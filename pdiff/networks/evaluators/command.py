"""Evaluation by a user's command, which prints an accuracy for a checkpoint file.

The command is the user's code, run because the configuration names it; nothing in a checkpoint file is ever run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.files import append_line, whole_lines
from pdiff.method.collection import Collection, StateDict
from pdiff.networks.evaluators import CHECKPOINT, Evaluation, Evaluations
from pdiff.networks.evaluators.pools import in_order, known_length, pool_size
from pdiff.networks.imported.template import Template

PYTHONS = ("python", "python3")  # these words stand for the running interpreter
GRACE = 3.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class CommandEvaluator:
    """Evaluates networks by the accuracy that a command prints. The folder holds `<group>.jsonl`, see `run_command`.

    Accuracies are all that is known: neither predictions, nor likelihoods, nor votes.
    Whether numbers up to 1 are percentages is decided over all groups together, since one script prints them all.
    Attributes are the arguments of `run_command`.
    """

    command: str
    template: Template
    folder: Path
    pattern: str
    workers: int

    def __call__(self, groups: Mapping[str, Collection], folder: Path) -> Evaluations:
        """Evaluate groups of networks; see `Evaluator`."""
        options = {"folder": self.folder, "pattern": self.pattern, "workers": self.workers, "template": self.template}
        texts = []
        for name, group in groups.items():
            places = {"scratch": folder / name, "path": folder / f"{name}.jsonl"}
            texts.append(run_command(self.command, group, label=f"evaluate {name}", **places, **options))
        accuracies = torch.tensor(fractions(list(chain.from_iterable(texts))), dtype=torch.float64)
        return {"test": dict(zip(groups, map(Evaluation, accuracies.split(list(map(len, texts)))), strict=True))}


def run_command(
    command: str,
    states: Iterable[StateDict],
    *,
    template: Template,
    scratch: Path,
    folder: Path,
    pattern: str,
    workers: int = 0,
    label: str = "evaluate",
    path: Path | None = None,
) -> list[str]:
    """The accuracy that a command prints for each network, as text; see `fractions`.

    Each network is written to a file like the user's, evaluated, and deleted. The command is split into words as a
    shell does, but no shell runs it. The last match of the pattern in its standard output counts, or, where there is
    none, the last one in its standard error.

    Args:
        command: contains {checkpoint}, which is replaced by the absolute path of the file.
        states: generated tensors of each network; taken one by one, at most a few ahead.
        template: layout of the user's files, and all tensors that are not generated.
        scratch: folder for the files; there are at most a few at a time.
        folder: working directory of the command.
        pattern: regular expression with one group, the accuracy.
        workers: commands at a time, 0 for one per core; they divide the cores among them (OMP_NUM_THREADS).
        label: of the progress bar.
        path: file of results, one line each, from which an interrupted evaluation continues.

    Raises:
        UserError: the command fails or prints no accuracy within 0 .. 100 %; with the last line that it printed.
    """
    runner = _Runner(command, folder, pattern, pool_size(workers))
    known: dict[int, str] = dict(whole_lines(path)) if path else {}

    def evaluate(numbered: tuple[int, StateDict]) -> tuple[int, str]:
        number, state = numbered
        file = scratch / f"{number:05d}{template.suffix}"
        template.write(file, state)
        try:
            return number, runner(file)
        finally:
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)

    todo = (numbered for numbered in enumerate(states) if numbered[0] not in known)
    bar = partial(tqdm, desc=label, unit="network", total=known_length(states), initial=len(known), disable=None)
    with ThreadPoolExecutor(runner.workers) as pool:
        try:
            for number, text in bar(in_order(pool, evaluate, todo, ahead=runner.workers)):
                known[number] = text
                if path:
                    append_line(path, json.dumps([number, text]))
        except BaseException:
            runner.stop()
            raise
    return [known[number] for number in sorted(known)]


class _Runner:
    """Runs a command for one file per thread; can be stopped."""

    def __init__(self, command: str, folder: Path, pattern: str, workers: int) -> None:
        if not folder.is_dir():
            raise UserError(f"evaluate.folder: {folder} is not a folder")
        words = shlex.split(command)
        self.words = [sys.executable, *words[1:]] if words[0] in PYTHONS else words
        self.folder, self.pattern, self.workers = folder, re.compile(pattern), workers
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        self.environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": threads}
        self.running: set[subprocess.Popen] = set()
        self.stopped, self.lock = False, threading.Lock()

    def __call__(self, file: Path) -> str:
        """The accuracy that the command prints for a file."""
        place = str(file.resolve())  # quoted in a word that is a command line itself, as in `sh -c "..."`
        words = [w.replace(CHECKPOINT, shlex.quote(place) if re.search(r"\s", w) else place) for w in self.words]
        process = self._start(words)
        try:
            output, errors = process.communicate()
        finally:
            with self.lock:
                self.running.discard(process)
        found = [match.group(1).strip() for text in (output, errors) for match in [*self.pattern.finditer(text)][-1:]]
        last = _last_line(errors if process.returncode else output) or _last_line(output + errors)
        where = f"evaluate.command: {shlex.join(words)}"
        if process.returncode:
            raise UserError(f"{where} ends with exit code {process.returncode}: {last}")
        if not found:
            raise UserError(f"{where} prints nothing that evaluate.pattern {self.pattern.pattern!r} matches: {last}")
        if _number(found[0]) is None:
            raise UserError(f"{where} prints an accuracy of {found[0]!r}, expected 0 .. 1 or 0 .. 100 %: {last}")
        return found[0]

    def _start(self, words: Sequence[str]) -> subprocess.Popen:
        """Start a command in a process group, so that it can be stopped together with its children."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        text = {"text": True, "errors": "replace"}
        with self.lock:
            if self.stopped:
                raise UserError("evaluate.command: stopped")
            try:
                process = subprocess.Popen(
                    words, cwd=self.folder, env=self.environment, start_new_session=True, **text, **pipes
                )
            except OSError as error:
                raise UserError(f"evaluate.command: {words[0]} cannot be run: {error.strerror}") from None
            self.running.add(process)
        return process

    def stop(self) -> None:
        """End all running commands and start no more."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in running:
                with suppress(ProcessLookupError):  # it has ended in the meantime
                    os.killpg(process.pid, number)
            end = time.monotonic() + GRACE
            while self.running and time.monotonic() < end:
                time.sleep(0.02)
            running = list(self.running)


def _last_line(text: str) -> str:
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _number(text: str) -> float | None:
    """The number of an accuracy within 0 .. 100, with or without %."""
    try:
        value = float(text.strip().rstrip("%"))
    except ValueError:
        return None
    return value if 0 <= value <= 100 else None


def fractions(texts: Sequence[str]) -> list[float]:
    """Accuracies of `run_command` as fractions.

    Numbers with a % are percentages; the others are, too, if one of them is above 1.
    """
    values = [_number(text) for text in texts]
    percent = any(value > 1 for value, text in zip(values, texts, strict=True) if "%" not in text)
    return [value / 100 if percent or "%" in text else value for value, text in zip(values, texts, strict=True)]
