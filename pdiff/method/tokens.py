"""Checkpoints as tokens: what belongs to one unit of a network, to a pair of units, and to none.

Permuting the units of a network permutes its tokens. Standardisation does not tell the units of a group apart, so a
distribution over tokens that treats all alike is one over networks that does not depend on the order of their units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pdiff.method.alignment.groups import Group
from pdiff.method.standardize import Slot

SMALLEST = 1e-6  # deviation below which a number is constant, in units of its tensor's: it is not divided


@dataclass(frozen=True)
class Layout:
    """The tokens of one network, in the order in which they stand in a row of L numbers.

    Attributes:
        nodes: (units, numbers of one) of every group: weights from inputs and to outputs, biases, norms, statistics.
        edges: (group a, group b, channels) of every pair of groups with weights between them: numbers of one pair of
            units, such as the kernel of a convolution.
        rest: numbers that belong to no unit, such as the biases of the outputs.

    Raises:
        ValueError: no nodes, sizes below 1, or edges between groups that are not there.
    """

    nodes: tuple[tuple[int, int], ...]
    edges: tuple[tuple[int, int, int], ...]
    rest: int

    def __post_init__(self) -> None:
        groups = range(len(self.nodes))
        known = all(a in groups and b in groups and channels > 0 for a, b, channels in self.edges)
        if not self.nodes or not known or self.rest < 0 or any(units < 1 or width < 0 for units, width in self.nodes):
            raise ValueError(f"these are no tokens: nodes {self.nodes}, edges {self.edges}, rest {self.rest}")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every block of a row: nodes (units, numbers), edges (units, units, channels), the rest."""
        edges = [(self.nodes[a][0], self.nodes[b][0], channels) for a, b, channels in self.edges]
        return [*self.nodes, *edges, (self.rest,)]

    @property
    def size(self) -> int:
        """L, the numbers of one network."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def pairs(self) -> int:
        """Pairs of units with weights between them."""
        return sum(self.nodes[a][0] * self.nodes[b][0] for a, b, _ in self.edges)

    def split(self, z: Tensor) -> list[Tensor]:
        """Rows (B, L) as blocks (B, *shape), views."""
        parts = z.split([torch.Size(shape).numel() for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unordered(self, z: Tensor) -> Tensor:
        """Rows (B, L) with the numbers of every block sorted along its units.

        Networks whose units stand in another order have the same result, and the distance of two results is at most
        that of the networks in any order of their units (sorting is 1-Lipschitz): a near copy stays near.
        """
        blocks = []
        for block in self.split(z):
            for axis in range(1, block.ndim - 1):
                block = block.sort(dim=axis).values
            blocks.append(block.flatten(1))
        return torch.cat(blocks, dim=1)

    def config(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Layout:
        """The inverse of `config`, after JSON."""
        nodes, edges = (tuple(tuple(map(int, part)) for part in config[name]) for name in ("nodes", "edges"))
        return cls(nodes, edges, int(config["rest"]))


def arranged(slots: Sequence[Slot], groups: Sequence[Group]) -> tuple[Layout, Tensor]:
    """The tokens of networks, and where their numbers are in a vector.

    Args:
        slots: the tensors of a vector (D,), see `Standardizer`.
        groups: interchangeable units, which stand in those tensors alone.

    Returns:
        The layout, and for every number of a row its index in the vector, int64 (D,), each index once.

    Raises:
        ValueError: there are no groups, or a tensor has units along more than two axes.
    """
    if not groups:
        raise ValueError("the networks have no interchangeable units among what is generated, so there are no tokens")
    nodes: list[list[Tensor]] = [[torch.empty(group.size, 0, dtype=torch.int64)] for group in groups]
    edges: dict[tuple[int, ...], list[Tensor]] = {}
    rest: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    first = 0
    for slot in slots:
        index = first + torch.arange(slot.size).reshape(slot.shape)
        first += slot.size
        for cell in product(*(_segments(slot, axis, groups) for axis in range(len(slot.shape)))):
            block = index
            for axis, (_, places) in enumerate(cell):
                block = block.index_select(axis, places.flatten())
            block = block.reshape([length for _, places in cell for length in places.shape])  # (units, others) an axis
            owners = sorted((group, 2 * axis) for axis, (group, _) in enumerate(cell) if group is not None)
            if len(owners) > 2:
                raise ValueError(f"tensor {slot.name} has units along {len(owners)} axes, expected at most 2")
            front = [axis for _, axis in owners]
            others = [axis for axis in range(block.ndim) if axis not in front]
            numbers = block.permute(*front, *others).flatten(len(front))
            if len(owners) == 2:
                edges.setdefault(tuple(group for group, _ in owners), []).append(numbers)
            else:
                (nodes[owners[0][0]] if owners else rest).append(numbers)
    joined = [torch.cat(parts, dim=-1) for parts in (*nodes, *edges.values(), rest)]
    sizes = [tuple(part.shape) for part in joined[: len(nodes)]]
    channels = [(*pair, part.shape[-1]) for pair, part in zip(edges, joined[len(nodes) : -1], strict=True)]
    return Layout(tuple(sizes), tuple(channels), len(joined[-1])), torch.cat([part.flatten() for part in joined])


def _segments(slot: Slot, axis: int, groups: Sequence[Group]) -> list[tuple[int | None, Tensor]]:
    """One axis of a tensor as (group, indices of its units (units, m)), and as (None, (1, n)) what belongs to none."""
    found: list[tuple[int | None, Tensor]] = [
        (k, place.index(group.size))
        for k, group in enumerate(groups)
        for place in group.places
        if (place.name, place.axis) == (slot.name, axis)
    ]
    free = torch.ones(slot.shape[axis], dtype=torch.bool)
    for _, places in found:
        free[places.flatten()] = False
    return [*found, (None, free.nonzero().T)] if free.any() else found


@dataclass
class Tokens:
    """Vectors (N, D) <-> rows of tokens (N, L = D), an invertible map.

    Attributes:
        layout: which numbers of a row belong to which units.
        order: index in the vector of every number of a row, int64 (L,).
        mean: subtracted from a row, (L,); the same for all units of a group.
        std: a row is then divided by it, (L,); the same for all units of a group.

    Raises:
        ValueError: tensors that do not fit each other.
    """

    layout: Layout
    order: Tensor
    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        size = self.layout.size
        if {self.order.shape, self.mean.shape, self.std.shape} != {(size,)} or not (self.std > 0).all():
            raise ValueError(f"order, mean and std of tokens do not describe {size} numbers")
        if not torch.equal(self.order.sort().values, torch.arange(size, device=self.order.device)):
            raise ValueError(f"order of tokens is no permutation of {size} numbers")

    @classmethod
    def fit(cls, x: Tensor, slots: Sequence[Slot], groups: Sequence[Group], *, standardize: bool = True) -> Tokens:
        """Arrange the numbers of vectors x (N, D), and measure mean and deviation of each over networks and units.

        Without `standardize` these are 0 and 1.

        Raises:
            ValueError: as `arranged`.
        """
        layout, order = arranged(slots, groups)
        if not standardize:
            return cls(layout, order, torch.zeros(layout.size), torch.ones(layout.size))
        means, stds = [], []
        for block in layout.split(x[:, order].double()):
            axes = tuple(range(block.ndim - 1))
            mean, std = block.mean(axes, keepdim=True), block.std(axes, correction=0, keepdim=True)
            means.append(mean.expand(1, *block.shape[1:]).flatten())
            stds.append(torch.where(std > SMALLEST, std, 1.0).expand(1, *block.shape[1:]).flatten())
        return cls(layout, order, torch.cat(means).float(), torch.cat(stds).float())

    def to(self, device: torch.device | str) -> Tokens:
        """The same, for rows and vectors on a device."""
        return Tokens(self.layout, *(part.to(device) for part in (self.order, self.mean, self.std)))

    def encode(self, x: Tensor) -> Tensor:
        """Rows (N, L) of vectors (N, D)."""
        return (x[:, self.order] - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """Vectors (N, D) of rows (N, L); the inverse of `encode`."""
        x = torch.empty_like(z)
        x[:, self.order] = z * self.std + self.mean
        return x
