"""Conditions of a generator: numbers of a network, such as its accuracy, that generated ones are asked to have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOP = 0.95  # quantile of a condition that is asked for by default


@dataclass
class Conditions:
    """Numbers of a network on which it is conditioned, such as its accuracy.

    Attributes:
        names: of the C columns.
        values: mean, deviation and 95th percentile of each over the fitted networks, (3, C).

    Raises:
        ValueError: values of other columns, or a deviation that is not positive.
    """

    names: tuple[str, ...]
    values: Tensor

    def __post_init__(self) -> None:
        if self.values.shape != (3, len(self.names)) or not (self.values[1] > 0).all():
            raise ValueError(f"conditions do not describe {len(self.names)} columns")

    @classmethod
    def fit(cls, names: tuple[str, ...], columns: Tensor) -> Conditions:
        """Measure columns (N, C), in which NaN is unknown.

        Raises:
            ValueError: another number of columns, or one of which nothing is known.
        """
        if columns.shape[1] != len(names):
            raise ValueError(f"expected {len(names)} conditions of every network, but got {columns.shape[1]}")
        values = torch.empty(3, len(names))
        for k, name in enumerate(names):
            column = columns[:, k][columns[:, k].isfinite()].double()
            if not len(column):
                raise ValueError(f"condition {name}: no network has a value")
            std = column.std(correction=0)
            top = column.sort().values[int(TOP * (len(column) - 1))]
            values[:, k] = torch.stack([column.mean(), torch.where(std > 1e-8, std, 1.0), top])
        return cls(names, values)

    def encode(self, columns: Tensor) -> Tensor:
        """Columns (B, C) in deviations from their mean."""
        return (columns - self.values[0]) / self.values[1]

    def asked(self, condition: Mapping[str, float]) -> Tensor:
        """What `encode` makes of one network with some values, (1, C); of the others the 95th percentile.

        Raises:
            ValueError: a name that is none of the columns.
        """
        if unknown := [name for name in condition if name not in self.names]:
            known = ", ".join(self.names) or "nothing"
            raise ValueError(f"condition {unknown[0]}: the generator is conditioned on {known}")
        row = [condition.get(name, top) for name, top in zip(self.names, self.values[2].tolist(), strict=True)]
        return self.encode(torch.tensor([row]))


class Guided(nn.Module):
    """A denoiser with conditions (1, C): free + guidance (conditioned - free)."""

    def __init__(self, denoiser: nn.Module, condition: Tensor, guidance: float) -> None:
        super().__init__()
        self.denoiser, self.condition, self.guidance = denoiser, condition, guidance

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        found = self.denoiser(z, t, self.condition.expand(len(z), -1))
        if self.guidance == 1:
            return found
        free = self.denoiser(z, t)
        return free + self.guidance * (found - free)
