"""Checkpoints <-> standardised vectors (method, section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pdiff.method.collection import Collection, StateDict, generated_tensors

VARIANCE_SHARE = 0.95  # running variances are divided by this share of their mean (method, section 2)
VARIANCE_OFFSET = 0.05  # ... and offset by this before the logarithm
VARIANCE_FLOOR = 0.001  # ... and never fall below this share of it on the way back


@dataclass(frozen=True)
class Slot:
    """One generated tensor's part of a vector, and its scalars of standardisation.

    Attributes:
        name: in the state dict.
        shape: in one checkpoint.
        dtype: such as "float32".
        mean: subtracted from its numbers.
        std: its numbers are then divided by it.
        variance: m of the transform of running variances, 0 for every other tensor.

    Raises:
        ValueError: no floating type, or scalars that are not finite or not positive.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    variance: float = 0.0

    def __post_init__(self) -> None:
        kind = getattr(torch, self.dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"tensor {self.name!r} is of type {self.dtype}, expected a floating type")
        if not all(map(math.isfinite, (self.mean, self.std, self.variance))) or self.std <= 0 or self.variance < 0:
            raise ValueError(
                f"tensor {self.name!r} has mean {self.mean} and deviation {self.std}, expected finite numbers: "
                "does a checkpoint hold NaN or infinity?"
            )

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

    Raises:
        ValueError: `order` names other tensors than slots and constants.
    """

    def __init__(self, slots: Sequence[Slot], constants: StateDict, order: Sequence[str]) -> None:
        self.slots, self.constants, self.order = tuple(slots), dict(constants), tuple(order)
        if sorted(self.order) != sorted([*self.constants, *(slot.name for slot in self.slots)]):
            raise ValueError("its order names other tensors than its slots and the constants")

    @property
    def size(self) -> int:
        """D, the length of a vector."""
        return sum(slot.size for slot in self.slots)

    @classmethod
    def fit(cls, collection: Collection) -> Standardizer:
        """Measure the scalars of every generated tensor over a collection.

        Raises:
            ValueError: nothing in the collection can be generated, or it holds NaN or infinity.
        """
        generated = generated_tensors(collection[0])
        slots = [_slot(name, collection.tensors[name]) for name in generated]
        constants = {n: t[0].clone() for n, t in collection.tensors.items() if n not in generated}
        return cls(slots, constants, list(collection.tensors))

    def encode(self, collection: Collection) -> Tensor:
        """Standardised vectors, float32 (N, D)."""
        device = collection.tensors[self.slots[0].name].device
        vectors = torch.empty(len(collection), self.size, device=device)
        for slot, columns in zip(self.slots, self._columns(vectors), strict=True):
            rows = collection.tensors[slot.name].float().flatten(1)
            if slot.variance:
                rows = (rows / slot.variance + VARIANCE_OFFSET).log()
            columns.copy_((rows - slot.mean) / slot.std)
        return vectors

    def decode(self, vectors: Tensor) -> Collection:
        """The checkpoints that vectors (N, D) stand for; the inverse of `encode`, constants put back."""
        tensors = {n: t.expand(len(vectors), *t.shape).clone() for n, t in self.constants.items()}
        for slot, rows in zip(self.slots, self._columns(vectors.float()), strict=True):
            rows = rows * slot.std + slot.mean
            if slot.variance:
                rows = (rows.exp() - VARIANCE_OFFSET).clamp(min=VARIANCE_FLOOR) * slot.variance
            tensors[slot.name] = rows.unflatten(1, slot.shape).to(getattr(torch, slot.dtype))
        return Collection({name: tensors[name] for name in self.order})

    def example(self) -> Collection:
        """One network of the layout that `decode` returns; its numbers are their means."""
        return self.decode(torch.zeros(1, self.size))

    def _columns(self, vectors: Tensor) -> Sequence[Tensor]:
        """The columns of vectors (N, D) that belong to each slot, as views."""
        return vectors.split([slot.size for slot in self.slots], dim=1)

    def config(self) -> dict[str, Any]:
        """Everything but the constants, as plain data."""
        return {"order": self.order, "slots": [asdict(slot) for slot in self.slots]}

    @classmethod
    def from_config(cls, config: dict[str, Any], constants: StateDict) -> Standardizer:
        """The inverse of `config`.

        Raises:
            KeyError, TypeError, ValueError: it is damaged, or does not fit the constants.
        """
        slots = [Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in config["slots"]]
        return cls(slots, constants, config["order"])


def _slot(name: str, stacked: Tensor) -> Slot:
    """Measure the scalars of one generated tensor (N, *shape)."""
    rows, variance = stacked.float().flatten(1), 0.0
    if name.endswith("running_var"):
        variance = VARIANCE_SHARE * rows.mean().clamp(min=torch.finfo(torch.float32).tiny).item()
        rows = (rows / variance + VARIANCE_OFFSET).log()
    std = rows.std(dim=1).mean().item()
    return Slot(name, tuple(stacked.shape[1:]), str(stacked.dtype)[6:], rows.mean().item(), std or 1.0, variance)
