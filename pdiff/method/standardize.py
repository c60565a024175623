"""Checkpoints <-> standardised vectors (method, section 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pdiff.method.collection import Collection, StateDict, empty, generated_tensors
from pdiff.method.vectors import Matrix, blocks, matrix

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

    def encode(self, numbers: Tensor) -> Tensor:
        """Some of its numbers, of any shape, standardised, float32."""
        numbers = transformed(numbers.float(), self.variance)
        return numbers.sub(self.mean).div_(self.std)

    def decode(self, numbers: Tensor) -> Tensor:
        """The inverse of `encode`, float32."""
        numbers = numbers * self.std + self.mean
        if self.variance:
            numbers = (numbers.exp() - VARIANCE_OFFSET).clamp(min=VARIANCE_FLOOR) * self.variance
        return numbers


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
    def fit(cls, collection: Collection, rows: Tensor | None = None) -> Standardizer:
        """Measure the scalars of every generated tensor over a collection, or over some of its rows.

        Raises:
            ValueError: nothing in the collection can be generated, or it holds NaN or infinity.
        """
        rows = torch.arange(len(collection)) if rows is None else rows
        first = collection[int(rows[0])]
        generated = generated_tensors(first)
        slots = [_slot(name, collection.tensors[name], rows) for name in generated]
        constants = {name: tensor.clone() for name, tensor in first.items() if name not in generated}
        return cls(slots, constants, list(collection.tensors))

    def encode(self, collection: Collection) -> Tensor:
        """Standardised vectors, float32 (N, D), in memory."""
        return self._columns(collection, slice(None), slice(0, self.size))

    def vectors(self, collection: Collection, *, among: int | None = None) -> Matrix:
        """As `encode`; many of them, or of those that they are kept `among`, are computed where they are read."""
        return matrix(len(collection), self.size, partial(self._columns, collection), among)

    def _columns(self, collection: Collection, rows: Tensor | slice, part: slice) -> Tensor:
        """Columns `part` of the vectors of some checkpoints."""
        found = []
        for slot, _, inside in self._slots(part):
            stacked = collection.tensors[slot.name].flatten(1)[:, inside]
            found.append(slot.encode(stacked[rows]))
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

    def decode(self, vectors: Matrix) -> Collection:
        """The checkpoints that vectors (N, D) stand for; the inverse of `encode`, constants put back."""
        n, place = len(vectors), "meta" if vectors.device.type == "cpu" else vectors.device
        like = {
            slot.name: torch.empty(slot.shape, dtype=getattr(torch, slot.dtype), device=place) for slot in self.slots
        }
        tensors = empty(like, n)
        for slot, columns, _ in self._slots(slice(0, self.size)):
            numbers = tensors[slot.name].flatten(1)
            for inside in blocks(slot.size, bytes_each=8 * n):
                part = slice(columns.start + inside.start, columns.start + inside.stop)
                numbers[:, inside] = slot.decode(vectors[:, part].float())
        for name, constant in self.constants.items():
            tensors[name] = constant.expand(n, *constant.shape).clone()
        return Collection({name: tensors[name] for name in self.order})

    def tensors(self, vectors: Tensor) -> StateDict:
        """The generated tensors that vectors (B, D) stand for, (B, *shape) each, float32, with their gradients."""
        found = {}
        for slot, columns, _ in self._slots(slice(0, self.size)):
            found[slot.name] = slot.decode(vectors[:, columns]).reshape(len(vectors), *slot.shape)
        return found

    def example(self) -> Collection:
        """One network of the layout that `decode` returns; its numbers are their means."""
        return self.decode(torch.zeros(1, self.size))

    def _slots(self, part: slice) -> Iterator[tuple[Slot, slice, slice]]:
        """The slots of some columns of the vectors: each with those columns, and with their places inside of it."""
        for slot, end in zip(self.slots, accumulate(slot.size for slot in self.slots), strict=True):
            start = end - slot.size
            low, high = max(part.start, start), min(part.stop, end)
            if low < high:
                yield slot, slice(low, high), slice(low - start, high - start)

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


def transformed(numbers: Tensor, variance: float) -> Tensor:
    """Running variances as they are standardised, where `variance` is the m of a slot; all others as they are."""
    return (numbers / variance + VARIANCE_OFFSET).log() if variance else numbers


def _slot(name: str, stacked: Tensor, rows: Tensor) -> Slot:
    """Measure the scalars of one generated tensor (N, *shape) over some checkpoints, a few at a time."""

    def moments(variance: float) -> tuple[float, float]:
        """The mean of all numbers, and the mean of the deviations of single checkpoints."""
        means, deviations = torch.empty(2, len(rows))  # a list of small tensors would lie between the blocks in memory
        for part in blocks(len(rows), bytes_each=8 * stacked[0].numel()):
            numbers = transformed(stacked[rows[part]].float().flatten(1), variance)
            means[part] = numbers.mean(dim=1)
            deviations[part] = numbers.std(dim=1)  # var_mean takes three times as long as both
        return means.mean(dtype=torch.float64).item(), deviations.mean().item()

    variance = 0.0
    if name.endswith("running_var"):
        variance = VARIANCE_SHARE * max(moments(0.0)[0], torch.finfo(torch.float32).tiny)
    mean, std = moments(variance)
    return Slot(name, tuple(stacked.shape[1:]), str(stacked.dtype)[6:], mean, std or 1.0, variance)
