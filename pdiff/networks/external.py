"""Networks that only their owner can measure: by a command that prints an accuracy, or by a function that predicts.

Both are the user's own code, run because the configuration names it; nothing in a checkpoint file is ever run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.files import append_line, whole_lines
from pdiff.networks.user_code import describe, load_function

if TYPE_CHECKING:  # what these import takes a process of `run_function` seconds
    from pdiff.method.collection import StateDict
    from pdiff.networks.imported.plain import Template

CHECKPOINT = "{checkpoint}"
PYTHONS = ("python", "python3")  # these words are the running interpreter
GRACE = 3.0  # seconds that a command has to end when it is told to
PROCESS_SECONDS = 5.0  # what starting processes costs: importing PyTorch, and the function's own preparations
TRIED = 2  # networks that a function is timed on: the first one often reads the images, too


def cores(workers: int) -> int:
    """How many run at a time: as many as asked for, 0 for as many as there are cores."""
    return workers or os.cpu_count() or 1


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
    """The accuracy that a command prints for each network, as it is printed; see `fractions`.

    Each network is written as one of the user's own files, measured, and deleted. The command is split into words as a
    shell does, but no shell runs it. Its standard output counts, or where no accuracy is found there its standard
    error; the last match counts.

    Args:
        command: holds {checkpoint}, which the absolute path of a file takes the place of.
        states: generated tensors of each network, taken one after the other, never more than a few ahead.
        template: how the user's files are laid out; also gives all other tensors.
        scratch: folder for the files; at most as many at a time as commands run.
        folder: where the command runs.
        pattern: a regular expression of one group, the accuracy.
        workers: files at a time, 0: as many as there are cores. They share the cores (OMP_NUM_THREADS).
        label: of the progress bar.
        path: where results are kept as they come, so that an interrupted evaluation goes on.

    Raises:
        UserError: the command fails, prints no accuracy, or none in 0 .. 100 %; with the last line that it printed.
    """
    runner, known = _Runner(command, folder, pattern, cores(workers)), _known(path)

    def measure(numbered: tuple[int, StateDict]) -> tuple[int, str]:
        number, state = numbered
        file = scratch / f"{number:05d}{template.suffix}"
        template.write(file, state)
        try:
            return number, runner(file)
        finally:
            file.unlink(missing_ok=True)

    todo = (numbered for numbered in enumerate(states) if numbered[0] not in known)
    bar = partial(tqdm, desc=label, unit="network", total=_length(states), initial=len(known), disable=None)
    with ThreadPoolExecutor(runner.workers) as pool:
        try:
            for number, text in bar(in_order(pool, measure, todo, ahead=runner.workers)):
                known[number] = text
                if path:
                    append_line(path, json.dumps([number, text]))
        except BaseException:
            runner.stop()
            raise
    return [known[number] for number in sorted(known)]


def _length(items: Iterable[Any]) -> int | None:
    return len(items) if isinstance(items, Sized) else None


def in_order(pool: Executor, function: Callable, items: Iterable[Any], *, ahead: int) -> Iterator[Any]:
    """The results of a function in the order of the items, of which at most `ahead` wait beside those that run."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Runner:
    """Runs a command for one file at a time and thread; can be stopped."""

    def __init__(self, command: str, folder: Path, pattern: str, workers: int) -> None:
        self.words, self.folder, self.pattern, self.workers = _words(command), folder, re.compile(pattern), workers
        if not folder.is_dir():
            raise UserError(f"evaluate.folder: {folder} is not a folder")
        bin_folder = str(Path(sys.executable).parent)
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        path = os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)])
        self.environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": threads}
        self.running: set[subprocess.Popen] = set()
        self.stopped, self.lock = False, threading.Lock()

    def __call__(self, file: Path) -> str:
        """The text of the accuracy of one file."""
        words = [self._filled(word, str(file.resolve())) for word in self.words]
        process = self._started(words)
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

    def _filled(self, word: str, file: str) -> str:
        """A word with the file's path; quoted where the word itself is a command line, as of `sh -c`."""
        return word.replace(CHECKPOINT, shlex.quote(file) if re.search(r"\s", word) else file)

    def _started(self, words: Sequence[str]) -> subprocess.Popen:
        """A process of a group of its own, so that it and its children can be stopped."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.lock:
            if self.stopped:
                raise UserError("evaluate.command: stopped")
            try:
                process = subprocess.Popen(
                    words,
                    cwd=self.folder,
                    env=self.environment,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                    **pipes,
                )
            except OSError as error:
                raise UserError(f"evaluate.command: {words[0]} cannot be run: {error.strerror}") from None
            self.running.add(process)
        return process

    def stop(self) -> None:
        """End what runs, and start nothing any more."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in running:
                with suppress(ProcessLookupError):  # it has ended in between
                    os.killpg(process.pid, number)
            end = time.monotonic() + GRACE
            while self.running and time.monotonic() < end:
                time.sleep(0.02)
            running = list(self.running)


def _words(command: str) -> list[str]:
    """The words of a command; the running interpreter where the first one is python."""
    words = shlex.split(command)
    return [sys.executable, *words[1:]] if words[0] in PYTHONS else words


def _last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _number(text: str) -> float | None:
    """The number of an accuracy in 0 .. 100, with or without %."""
    try:
        value = float(text.strip().rstrip("%"))
    except ValueError:
        return None
    return value if 0 <= value <= 100 else None


def fractions(texts: Sequence[str]) -> list[float]:
    """Accuracies of `run_command` as fractions: those with a % are percentages, as are all others if one is above 1."""
    values = [_number(text) for text in texts]
    percent = any(value > 1 for value, text in zip(values, texts, strict=True) if "%" not in text)
    return [value / 100 if percent or "%" in text else value for value, text in zip(values, texts, strict=True)]


def _known(path: Path | None) -> dict[int, str]:
    """Position -> accuracy, of what an interrupted run has measured."""
    return dict(whole_lines(path)) if path else {}


def run_function(
    spec: str,
    states: Iterable[StateDict],
    *,
    template: Template | None = None,
    workers: int = 0,
    label: str = "evaluate",
) -> tuple[Tensor, Tensor]:
    """What a function of somebody's predicts with each network.

    The function takes a state dict and returns predicted classes and labels, (images,) each, or only which images are
    right, bool (images,); tensors, arrays or lists; the same images in the same order for every network. Networks are
    given to several processes where that is faster and the function does not use a GPU.

    Args:
        spec: `path/to/file.py:function`.
        states: tensors of each network, N of them.
        template: gives all the tensors that they lack.
        workers: processes, 0: as many as there are cores; 1: none beside this one.
        label: of the progress bar.

    Returns:
        Predictions (N, images) and labels (images,), of one integer type; of a function that tells only what is
        right, 1 where it is, and labels 1.

    Raises:
        UserError: the function fails, or returns something else; with its own message.
    """
    total = _length(states)
    rows: list[Tensor] = []
    labels = None
    with tqdm(total=total, desc=label, unit="network", disable=None) as bar:
        for k, (predicted, own) in enumerate(_called(spec, _complete(states, template), total, workers)):
            labels = own if labels is None else labels
            if own.shape != labels.shape or not torch.equal(own, labels):
                raise UserError(
                    f"evaluate.function {spec}: network {k} has other labels than the first one ({len(own)} and "
                    f"{len(labels)} images), expected the same images in the same order"
                )
            rows.append(predicted.int())
            bar.update()
    predictions = torch.stack(rows)
    kind = _type(max(predictions.max().item(), labels.max().item()))
    return predictions.to(kind), labels.to(kind)


def _type(largest: int) -> torch.dtype:
    """The smallest type for classes up to the largest."""
    return next(kind for kind in (torch.uint8, torch.int16, torch.int64) if largest <= torch.iinfo(kind).max)


def _complete(states: Iterable[StateDict], template: Template | None) -> Iterator[StateDict]:
    """Networks with copies of all their tensors: a function may change them."""
    for state in states:
        full = template.complete(state) if template else state
        yield {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in full.items()}


def _called(spec: str, states: Iterator[StateDict], total: int | None, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Results of the function in order: of the first networks here, and of the others in processes where it pays."""
    function, seconds = load_function(spec, "evaluate.function"), 0.0
    for k, state in enumerate(islice(states, TRIED)):
        begin = time.perf_counter()
        result = _result(function, spec, k, state)
        seconds = time.perf_counter() - begin
        yield result
    on_gpu = torch.cuda.is_initialized() and not workers
    workers = cores(workers)
    saved = seconds * ((total or 0) - TRIED) * (1 - 1 / workers)
    if on_gpu or saved < PROCESS_SECONDS:
        yield from (_result(function, spec, k, state) for k, state in enumerate(states, TRIED))
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _begin, (spec, workers))
    try:
        packed = ((k, pack(state)) for k, state in enumerate(states, TRIED))
        for arrays in in_order(pool, _in_process, packed, ahead=workers):
            yield tuple(torch.from_numpy(array) for array in arrays)
    except BrokenProcessPool:
        raise UserError(f"evaluate.function {spec}: a process of {workers} died; is the memory enough?") from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_function: tuple[str, Callable] | None = None  # of a process that `_begin` has begun


def _begin(spec: str, workers: int) -> None:
    """Prepare a process: its share of the cores, and the function."""
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it ends it
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _function = spec, load_function(spec, "evaluate.function")


def _in_process(packed: tuple[int, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Call the function in a process; arrays, since tensors would travel through shared memory."""
    spec, function = _function
    predicted, labels = _result(function, spec, packed[0], unpack(packed[1]))
    return predicted.numpy(), labels.numpy()


def _result(function: Callable, spec: str, k: int, state: StateDict) -> tuple[Tensor, Tensor]:
    """Predicted classes and labels of one network, int64 (images,) each."""
    where = f"evaluate.function {spec}: network {k}"
    try:
        returned = function(state)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {describe(error)}") from None
    if isinstance(returned, tuple | list) and len(returned) == 2:
        predicted, labels = (_classes(value, f"{where}: {what}") for value, what in zip(returned, WHAT, strict=True))
        if predicted.shape != labels.shape:
            raise UserError(f"{where}: {len(predicted)} predictions and {len(labels)} labels, expected as many")
        return predicted, labels
    right = _tensor(returned, f"{where}: what it returns")
    if right.dtype != torch.bool or right.ndim != 1 or not len(right):
        raise UserError(f"{where}: returns {_kind(right)}, expected predictions and labels, or bool (images,)")
    return right.long(), torch.ones(len(right), dtype=torch.int64)


WHAT = ("predictions", "labels")


def _tensor(value: Any, where: str) -> Tensor:
    """A tensor of what a function returned."""
    try:
        return torch.as_tensor(value).detach().cpu()
    except Exception as error:
        raise UserError(f"{where}: {type(value).__name__}, expected a tensor: {describe(error)}") from None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}"


def _classes(value: Any, where: str) -> Tensor:
    """Classes, int64 (images,)."""
    classes = _tensor(value, where)
    whole = classes.dtype != torch.bool and not classes.is_complex() and bool((classes == classes.round()).all())
    if classes.ndim != 1 or not len(classes) or not whole:
        hint = "; take .argmax(1) of logits" if classes.ndim == 2 else ""
        raise UserError(f"{where} are {_kind(classes)}, expected classes (images,), whole numbers{hint}")
    if classes.min() < 0:
        raise UserError(f"{where} hold {classes.min().item():g}, expected classes from 0")
    return classes.long()
