"""Somebody's checkpoint files as a collection. The files are untrusted: nothing is unpickled but tensors."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pdiff.checkpoints import check_states, matching
from pdiff.errors import UserError
from pdiff.files import read_tensors
from pdiff.weights import Collection, StateDict

SUFFIXES = (".pth", ".pt", ".safetensors")
NESTED_UNDER = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict
PREFIX = "module."  # of networks saved under DataParallel


def adopt(folder: Path, patterns: Sequence[str] = ("all",)) -> Collection:
    """Read every checkpoint file of a folder, in the order of the names.

    Args:
        folder: holds .pth, .pt or .safetensors files, one state dict each.
        patterns: names or patterns of the tensors to take; the others are left out.

    Raises:
        UserError: an absent or empty folder, a damaged file, a pickle with anything but tensors in it, mixed layouts,
            NaN or infinity; by file and tensor.
    """
    paths = checkpoint_files(folder)
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda path: _chosen(read_state(path), path, patterns), paths)
        states = list(tqdm(read, total=len(paths), desc="read", unit="file", disable=None))
    check_states(states, [str(path) for path in paths])
    return Collection.stack(states, [path.name for path in paths])


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder by name, at least two."""
    if not folder.is_dir():
        raise UserError(f"prepare.source: {folder} is not a folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(paths) < 2:
        raise UserError(f"prepare.source: {folder} holds {len(paths)} files {'/'.join(SUFFIXES)}, expected at least 2")
    return paths


def first_state(folder: Path) -> StateDict:
    """All tensors of the first checkpoint of a folder, those that are not generated included."""
    return read_state(checkpoint_files(folder)[0])


def read_state(path: Path) -> StateDict:
    """The state dict of one file, plain or nested under a usual key, without the prefix of DataParallel.

    Raises:
        UserError: the file is damaged, holds code, or holds something else than tensors.
    """
    content: Any = read_tensors(path) if path.suffix == ".safetensors" else _load(path)
    for key in NESTED_UNDER:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict (name -> tensor)")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
    prefixed = all(name.startswith(PREFIX) for name in content)
    return {name[len(PREFIX) :] if prefixed else name: tensor.detach() for name, tensor in content.items()}


def _load(path: Path) -> Any:
    """Tensors and containers of a file of torch.save; code in it is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors (or is damaged); pickled code is never run") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable checkpoint: {reason}") from None


def _chosen(state: StateDict, path: Path, patterns: Sequence[str]) -> StateDict:
    """The tensors of a state that match, in its order."""
    chosen = {name: state[name] for name in matching(state, patterns)}
    if not chosen:
        raise UserError(f"{path}: no tensor matches prepare.parameters {', '.join(patterns)}")
    return chosen
