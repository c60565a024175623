"""Folders of checkpoint files as users have them, sound and suspicious."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def network(seed: int, *, scale: float = 0.1) -> State:
    """A network near a common one: constants, BatchNorm, a counter, a single number."""
    g = torch.Generator().manual_seed(seed)
    return {
        "stem.weight": torch.ones(5, 3),
        "norm.running_mean": 1 + scale * torch.randn(5, generator=g),
        "norm.num_batches_tracked": torch.tensor(seed),
        "head.weight": 2 + scale * torch.randn(4, 5, generator=g),
        "head.bias": scale * torch.randn(4, generator=g),
        "temperature": torch.randn(1, generator=g),
    }


def folder_of(states: dict[str, object], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        torch.save(state, folder / name)
    return folder


def plain(folder: Path, count: int = 12, **options) -> Path:
    return folder_of({f"{k:02d}.pth": network(k, **options) for k in range(count)}, folder)


class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def without(state: State, name: str) -> State:
    return {n: t for n, t in state.items() if n != name}


def cut(path: Path) -> None:
    torch.save(network(1), path)
    path.write_bytes(path.read_bytes()[:-100])


UNUSABLE: dict[str, tuple[Callable[[Path], object] | object, str]] = {
    "empty.pth": (lambda path: path.touch(), "is empty"),
    "nothing.pth": ({}, "holds a dict, expected a state dict"),
    "link.pth": (lambda path: path.symlink_to("absent"), "cannot be read: No such file"),
    "sparse.pth": (network(1) | {"head.bias": torch.ones(4).to_sparse()}, "head.bias is a sparse tensor"),
    "cut.pth": (cut, "not a readable checkpoint"),
    "text.safetensors": (lambda path: path.write_text("hello"), "not a readable safetensors file"),
    "code.pth": (network(1) | {"x": Code()}, "holds more than tensors"),
    "whole.pt": (nn.Linear(2, 3), "holds more than tensors (torch.nn.modules.linear.Linear)"),
    "less.pth": (without(network(1), "head.bias"), "other layout than most files: has no head.bias"),
    "more.pth": (network(1) | {"gain": torch.ones(3)}, "other layout than most files: has gain, too"),
    "shape.pth": (
        network(1) | {"head.bias": torch.ones(7)},
        "other layout than most files: head.bias is (7,) instead of (4,)",
    ),
    "half.pth": (
        {n: t.half() if t.is_floating_point() else t for n, t in network(1).items()},
        "other types than most files: float16 instead of float32 in stem.weight, norm.running_mean, head.weight and 2",
    ),
    "nan.pth": (network(1) | {"head.bias": torch.tensor([0, math.nan, 0, 0])}, "head.bias holds NaN or infinity"),
    "inf.pth": (network(1) | {"temperature": torch.tensor([math.inf])}, "temperature holds NaN or infinity"),
    "odd [1]#\n.pth": (network(1) | {"gain": torch.ones(3)}, "other layout"),
}
REPORTED = {
    "far.pth": (network(1) | {"head.weight": network(1)["head.weight"] + 50}, "outlier: "),
    "twin.pth": (network(3), "duplicate of 03.pth"),
}


def suspicious(folder: Path) -> Path:
    plain(folder)
    for name, (content, _) in (UNUSABLE | REPORTED).items():
        content(folder / name) if callable(content) and not isinstance(content, nn.Module) else torch.save(
            content, folder / name
        )
    (folder / "notes.txt").write_text("no checkpoint")
    return folder
