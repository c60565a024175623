"""Evaluation by a user's function, which predicts with a state dict.

The function is the user's code, run because the configuration names it; nothing in a checkpoint file is ever run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
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
from pdiff.files import read_tensors, write_tensors
from pdiff.networks.evaluators import Evaluation, Evaluations
from pdiff.networks.evaluators.pools import in_order, known_length, pool_size
from pdiff.networks.user_code import describe, load_function

if TYPE_CHECKING:  # a worker process imports this module, and these would take it seconds
    from pdiff.method.collection import Collection, StateDict
    from pdiff.networks.imported.template import Template

PROCESS_SECONDS = 5.0  # cost of starting worker processes: importing PyTorch, and what the user's file prepares
TIMED = 2  # networks that are evaluated in this process to time the function: the first call often reads the images
RETURNED = ("predictions", "labels")
NONE = torch.zeros(0, dtype=torch.int64)  # the labels of a function that returns an accuracy


@dataclass(frozen=True)
class FunctionEvaluator:
    """Evaluates networks by a function. The folder holds `<group>.safetensors`: what `run_function` returns.

    Likelihoods and votes are unknown: a function returns classes. Of one that returns only which predictions are right,
    `predicted` is 1 where they are; of one that returns an accuracy nothing else is known.

    Attributes:
        function: `path/to/file.py:function`, or the function itself.
        template: all tensors that are not generated; None where networks lack none.
        workers: processes; see `run_function`.
    """

    function: str | Callable
    template: Template | None = None
    workers: int = 0

    def __call__(self, groups: Mapping[str, Collection], folder: Path) -> Evaluations:
        """Evaluate groups of networks; see `Evaluator`.

        Raises:
            UserError: groups were evaluated with different labels, and cannot be compared; or the file of a group
                holds something else.
        """
        found = {}
        for name, group in groups.items():
            path = folder / f"{name}.safetensors"
            if not path.exists():
                options = {"template": self.template, "workers": self.workers, "label": f"evaluate {name}"}
                write_tensors(path, run_function(self.function, group, **options))
            found[name] = read_tensors(path)
            if found[name].keys() not in ({"predicted", "labels"}, {"accuracy"}):
                held = ", ".join(sorted(found[name]))
                raise UserError(f"{path}: holds {held}, expected labels and predicted, or accuracy")
        first, *others = found
        for name in others:
            if not torch.equal(found[name].get("labels", NONE), found[first].get("labels", NONE)):
                raise UserError(f"{_named(self.function)}: the labels of {name} are not those of {first}")
        return {"test": {name: _evaluation(**tensors) for name, tensors in found.items()}}


def _evaluation(
    *, predicted: Tensor | None = None, labels: Tensor | None = None, accuracy: Tensor | None = None
) -> Evaluation:
    """What the tensors of `run_function` say of the networks of a group."""
    return Evaluation(accuracy) if predicted is None else Evaluation.of(predicted != labels, predicted)


def run_function(
    function: str | Callable,
    states: Iterable[StateDict],
    *,
    template: Template | None = None,
    workers: int = 0,
    label: str = "evaluate",
) -> dict[str, Tensor]:
    """What a user's function predicts with each network.

    The function takes a state dict and returns predicted classes and labels, (images,) each, or only which predictions
    are right, bool (images,); tensors, arrays or lists; for the same images in the same order with every network. Or
    it returns the accuracy of the network, a number in [0, 1]. Networks are distributed over processes where that is
    faster, the function is in a file, and does not use a GPU.

    Args:
        function: `path/to/file.py:function`, or the function itself.
        states: N networks.
        template: all tensors that they lack.
        workers: processes; 0 for one per core, 1 for this process alone.
        label: of the progress bar.

    Returns:
        `predicted` (N, images), of the smallest integer type, and `labels`, int64 (images,); for a function that
        returns only which predictions are right, 1 where they are, and labels 1. Or `accuracy`, float64 (N,).

    Raises:
        UserError: the function fails or returns something else.
    """
    total = known_length(states)
    rows: list[Tensor] = []
    labels, where = None, _named(function)
    with tqdm(total=total, desc=label, unit="network", disable=None) as bar:
        for k, (predicted, found) in enumerate(_results(function, _complete(states, template), total, workers)):
            labels = found if labels is None else labels
            if not torch.equal(found, labels):
                raise UserError(
                    f"{where}: network {k} has other labels than the first one ({len(found)} and "
                    f"{len(labels)} images), expected the same images in the same order"
                )
            rows.append(predicted.int() if len(labels) else predicted)
            bar.update()
    if not len(labels):
        return {"accuracy": torch.stack(rows)}
    predictions = torch.stack(rows)
    largest = max(predictions.max().item(), labels.max().item())
    dtype = next(dtype for dtype in (torch.uint8, torch.int16, torch.int64) if largest <= torch.iinfo(dtype).max)
    return {"predicted": predictions.to(dtype), "labels": labels}


def _named(function: str | Callable) -> str:
    """The function in messages: the key of the configuration, or the argument, that gives it."""
    if isinstance(function, str):
        return f"evaluate.function {function}"
    return f"evaluate {getattr(function, '__qualname__', type(function).__name__)}"


def _complete(states: Iterable[StateDict], template: Template | None) -> Iterator[StateDict]:
    """Networks with copies of all their tensors, since a function may change them."""
    for state in states:
        full = template.complete(state) if template else state
        yield {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in full.items()}


def _results(
    given: str | Callable, states: Iterator[StateDict], total: int | None, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Results of the function in order: for the first networks in this process, for the others where it is faster."""
    function, seconds = load_function(given, "evaluate.function") if isinstance(given, str) else given, 0.0
    where = _named(given)
    for k, state in enumerate(islice(states, TIMED)):
        begin = time.perf_counter()
        result = _result(function, where, k, state)
        seconds = time.perf_counter() - begin
        yield result
    on_gpu = torch.cuda.is_initialized() and not workers
    workers = pool_size(workers)
    saved = seconds * ((total or 0) - TIMED) * (1 - 1 / workers)
    if on_gpu or saved < PROCESS_SECONDS or not isinstance(given, str):
        yield from (_result(function, where, k, state) for k, state in enumerate(states, TIMED))
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (given, workers))
    try:
        packed = ((k, pack(state)) for k, state in enumerate(states, TIMED))
        for arrays in in_order(pool, _result_in_worker, packed, ahead=workers):
            yield tuple(torch.from_numpy(array) for array in arrays)
    except BrokenProcessPool:
        raise UserError(f"{where}: a process of {workers} died; is the memory enough?") from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_function: tuple[str, Callable] | None = None  # of a worker process, set by `_start_worker`


def _start_worker(spec: str, workers: int) -> None:
    """Prepare a worker process: its share of the cores, and the function."""
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends it
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _function = spec, load_function(spec, "evaluate.function")


def _result_in_worker(packed: tuple[int, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Call the function in a worker process; returns arrays, since tensors would travel through shared memory."""
    spec, function = _function
    predicted, labels = _result(function, _named(spec), packed[0], unpack(packed[1]))
    return predicted.numpy(), labels.numpy()


def _result(function: Callable, what: str, k: int, state: StateDict) -> tuple[Tensor, Tensor]:
    """Predicted classes and labels of one network, int64 (images,) each; or its accuracy, float64 (), and no labels."""
    where = f"{what}: network {k}"
    try:
        returned = function(state)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {describe(error)}") from None
    if isinstance(returned, tuple | list) and len(returned) == 2:
        predicted, labels = (
            _classes(value, f"{where}: {what}") for value, what in zip(returned, RETURNED, strict=True)
        )
        if predicted.shape != labels.shape:
            raise UserError(f"{where}: {len(predicted)} predictions and {len(labels)} labels, expected as many")
        return predicted, labels
    right = _tensor(returned, f"{where}: what it returns")
    if not right.ndim and right.is_floating_point():
        if not 0 <= right <= 1:
            raise UserError(f"{where}: returns the accuracy {right:g}, expected a number in [0, 1]")
        return right.double(), NONE
    if right.dtype != torch.bool or right.ndim != 1 or not len(right):
        raise UserError(
            f"{where}: returns {_kind(right)}, expected predictions and labels, bool (images,), or an accuracy"
        )
    return right.long(), torch.ones(len(right), dtype=torch.int64)


def _tensor(value: Any, where: str) -> Tensor:
    """What a function returned as a tensor."""
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
