"""Checkpoints <-> standardised vectors (method, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff.method.collection import Collection, StateDict, generated_tensors

VARIANCE_SHARE = 0.95  # running variances are divided by this share of their mean (method, section 2)
VARIANCE_OFFSET = 0.05  # ... and offset by this before the logarithm
VARIANCE_FLOOR = 0.001  # ... and never fall below this share of it on the way back


@dataclass(frozen=True)
class Slot:
    """Where one generated tensor sits in a vector, and its two scalars of standardisation.

    `variance` is m of the running-variance transform, 0 for every other tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    variance: float = 0.0

    @property
    def size(self) -> int:
        """Numbers in one checkpoint's tensor."""
        return torch.Size(self.shape).numel()


class Standardizer:
    """Checkpoints <-> vectors of mean about 0 and deviation about 1, one pair of scalars a tensor (method, section 2).

    Attributes:
        slots: the generated tensors in state-dict order.
        constants: tensors that are not generated, kept from the first checkpoint.
        order: all tensor names in state-dict order.
    """

    def __init__(self, slots: Sequence[Slot], constants: StateDict, order: Sequence[str]) -> None:
        self.slots, self.constants, self.order = tuple(slots), dict(constants), tuple(order)

    @property
    def size(self) -> int:
        """D, the length of a vector."""
        return sum(slot.size for slot in self.slots)

    @classmethod
    def fit(cls, collection: Collection) -> Standardizer:
        """Measure the scalars of every generated tensor over a collection.

        Raises:
            UserError: nothing in the collection can be generated.
        """
        generated = generated_tensors(collection[0])
        slots = [_slot(name, collection.tensors[name]) for name in generated]
        constants = {n: t[0].clone() for n, t in collection.tensors.items() if n not in generated}
        return cls(slots, constants, list(collection.tensors))

    def encode(self, collection: Collection) -> Tensor:
        """Standardised vectors, float32 (N, D)."""
        columns = []
        for slot in self.slots:
            rows = collection.tensors[slot.name].float().flatten(1)
            if slot.variance:
                rows = (rows / slot.variance + VARIANCE_OFFSET).log()
            columns.append((rows - slot.mean) / slot.std)
        return torch.cat(columns, dim=1)

    def decode(self, vectors: Tensor) -> Collection:
        """The checkpoints that vectors (N, D) stand for; the inverse of `encode`, constants put back."""
        tensors = {n: t.expand(len(vectors), *t.shape) for n, t in self.constants.items()}
        for slot, rows in zip(self.slots, vectors.float().split([s.size for s in self.slots], dim=1), strict=True):
            rows = rows * slot.std + slot.mean
            if slot.variance:
                rows = (rows.exp() - VARIANCE_OFFSET).clamp(min=VARIANCE_FLOOR) * slot.variance
            tensors[slot.name] = rows.unflatten(1, slot.shape).to(getattr(torch, slot.dtype))
        return Collection({name: tensors[name] for name in self.order})


def _slot(name: str, stacked: Tensor) -> Slot:
    """Measure one generated tensor (N, *shape)."""
    rows, variance = stacked.float().flatten(1), 0.0
    if name.endswith("running_var"):
        variance = VARIANCE_SHARE * rows.mean().clamp(min=torch.finfo(torch.float32).tiny).item()
        rows = (rows / variance + VARIANCE_OFFSET).log()
    std = rows.std(dim=1).mean().item()
    return Slot(name, tuple(stacked.shape[1:]), str(stacked.dtype)[6:], rows.mean().item(), std or 1.0, variance)
