"""What old versions of PyTorch (2.0 up) need: every special case, and the version that ended it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def ema(decay: float) -> dict[str, Callable]:
    """Options of `AveragedModel` for an exponential moving average: all tensors in one call since 2.1."""
    from torch.optim import swa_utils

    if hasattr(swa_utils, "get_ema_multi_avg_fn"):
        return {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)}
    return {"avg_fn": lambda averaged, now, count: decay * averaged + (1 - decay) * now}


def fused(device: str) -> dict[str, bool]:
    """Options of Adam, AdamW and SGD that update all tensors in one kernel.

    On CUDA since 2.3 (SGD has no such option before, and Adam of 2.0 cannot resume with it), on CPUs since 2.4.
    """
    since = {"cuda": (2, 3), "cpu": (2, 4)}.get(device)
    return {"fused": True} if since and since <= VERSION else {}


def plain_state(schedule: dict[str, Any]) -> dict[str, Any]:
    """The state of a learning-rate schedule without the functions that schedules keep before 2.1."""
    return {key: value for key, value in schedule.items() if not callable(value)}


def mapped(wanted: bool) -> dict[str, bool]:
    """Options of `torch.load` that map a file to memory, since 2.1."""
    return {"mmap": wanted} if "mmap" in inspect.signature(torch.load).parameters else {}


def assigned() -> dict[str, bool]:
    """Options of `load_state_dict` that put the given tensors into a module, without copies, since 2.1."""
    return {"assign": True} if VERSION >= (2, 1) else {}


def launcher_logs(folder: str) -> dict[str, Any]:
    """Where the elastic launcher writes its logs: `logs_specs` since 2.3, `log_dir` before."""
    from torch.distributed.elastic import multiprocessing

    if hasattr(multiprocessing, "DefaultLogsSpecs"):
        return {"logs_specs": multiprocessing.DefaultLogsSpecs(log_dir=folder)}
    return {"log_dir": folder}


def exports_models() -> bool:
    """Whether there is `torch.export`, by which MLflow logs PyTorch models: since 2.1."""
    return find_spec("torch.export") is not None
