"""Groups of interchangeable units: permute, rescale and recombine them in stacked tensors."""

from __future__ import annotations

from collections.abc import Collection as Container
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pdiff.method.collection import Collection, empty
from pdiff.seeds import stream

Permutations = Mapping[str, Tensor]
"""Name of a group -> for every network which old unit each new unit is, int64 (N, size)."""

BALANCED = 1e-6  # largest change of log scale in a sweep at which `balance` stops


class Place(NamedTuple):
    """Where the units of a group stand along one axis of a tensor.

    Unit k owns the indices [start + k * block, start + (k + 1) * block).

    Attributes:
        name: of the tensor in the state dict.
        axis: of the tensor of one network.
        start: first index of unit 0.
        block: indices of one unit: above 1 for the pixels of a flattened channel, or for the width of a head.
        incoming: whether the tensor computes the unit (rows of weights, biases, norms) rather than reads it (columns).
    """

    name: str
    axis: int
    start: int
    block: int
    incoming: bool

    def index(self, size: int) -> Tensor:
        """Indices of every unit, int64 (size, block)."""
        return self.start + torch.arange(size * self.block).reshape(size, self.block)


@dataclass(frozen=True)
class Group:
    """Units that may be permuted together without changing what the network computes.

    Attributes:
        name: of the first tensor that computes the units; unique among the groups.
        size: number of units.
        places: everywhere that the units stand.
        balanceable: whether a unit may be scaled by c > 0 where it is computed and by 1 / c where it is read.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    balanceable: bool = False

    def axes(self) -> dict[tuple[str, int], Tensor]:
        """(tensor, axis) -> indices of every unit along it, int64 (size, indices of one unit)."""
        found: dict[tuple[str, int], list[Tensor]] = {}
        for place in self.places:
            found.setdefault((place.name, place.axis), []).append(place.index(self.size))
        return {key: torch.cat(parts, dim=1) for key, parts in found.items()}


@dataclass(frozen=True)
class Groups:
    """The groups of a network, and what cannot be permuted.

    Attributes:
        groups: those that may be permuted, each independently of the others.
        left_alone: name of a tensor -> why units of it are not permuted. The inputs and outputs of the network are
            never permuted, and are not named here.
    """

    groups: tuple[Group, ...]
    left_alone: dict[str, str]

    def __iter__(self):
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def within(self, names: Container[str]) -> Groups:
        """The groups that stand in the named tensors alone; the others are left alone, since half would be missing."""
        kept, left = [], {name: reason for name, reason in self.left_alone.items() if name in names}
        for group in self.groups:
            missing = [place.name for place in group.places if place.name not in names]
            if not missing:
                kept.append(group)
                continue
            for place in group.places:
                if place.name in names:
                    left.setdefault(place.name, f"its units also stand in {missing[0]}, which is not in the collection")
        return replace(self, groups=tuple(kept), left_alone=left)


def permute(collection: Collection, groups: Groups, permutations: Permutations) -> Collection:
    """Permute the units of every network of a collection: new unit i is old unit p[i].

    Args:
        collection: N networks, which hold all places of the groups.
        groups: of their architecture.
        permutations: group -> int64 (N, size); or (size,), the same for all networks. Absent groups stay as they are.

    Raises:
        ValueError: a group that is not there, or something else than permutations of its units.
    """
    known = {group.name: group for group in groups}
    tensors = dict(collection.tensors)
    for name, permutation in permutations.items():
        if name not in known:
            raise ValueError(f"expected permutations of {', '.join(known) or 'no group'}, but got one of {name}")
        rows = permutation.expand(len(collection), -1)
        if rows.shape[1] != known[name].size or not torch.equal(rows.sort(dim=1).values, identity(known[name], rows)):
            raise ValueError(f"expected permutations of {known[name].size} units for group {name}, but got others")
        permute_group(tensors, known[name], rows)
    return Collection(tensors, collection.names)


def identity(group: Group, like: Tensor) -> Tensor:
    """The permutation that changes nothing, for as many networks as `like` has rows, int64 (N, size)."""
    return torch.arange(group.size, device=like.device).expand(len(like), -1)


def inverse(permutations: Permutations) -> dict[str, Tensor]:
    """The permutations that undo others."""
    return {name: permutation.argsort(dim=-1) for name, permutation in permutations.items()}


def permute_group(tensors: dict[str, Tensor], group: Group, permutation: Tensor) -> None:
    """Replace the stacked tensors of a group, (N, *shape), by permuted ones.

    Args:
        tensors: changed; the old tensors are not.
        group: whose units are permuted.
        permutation: int64 (N, size).
    """
    for (name, axis), index in group.axes().items():
        stacked = tensors[name]
        index, permutation = index.to(stacked.device), permutation.to(stacked.device)
        taken = torch.arange(stacked.shape[axis + 1], device=stacked.device).repeat(len(stacked), 1)
        taken[:, index.flatten()] = index[permutation].flatten(1)
        tensors[name] = take(stacked, axis, taken)


def take(stacked: Tensor, axis: int, index: Tensor) -> Tensor:
    """Entries of each network's tensor along one axis.

    Args:
        stacked: (N, *shape).
        axis: of shape.
        index: int64 (N, n).

    Returns:
        (N, *shape) with n instead of shape[axis].
    """
    if len(stacked) == 1:
        return stacked.index_select(axis + 1, index[0])
    rows = torch.arange(len(stacked), device=stacked.device)[:, None]
    return stacked.movedim(axis + 1, 1)[rows, index].movedim(1, axis + 1).contiguous()


def balance(collection: Collection, groups: Groups, *, sweeps: int = 100) -> tuple[Collection, dict[str, Tensor]]:
    """Rescale units to equal norms on both sides: c_j = sqrt(|outgoing_j| / |incoming_j|).

    Positively homogeneous activations let unit j be computed c_j times as large and read 1 / c_j times as large. Each
    step minimises the sum of squares of a group's tensors, so that sweeps over the groups converge to the one set of
    scales of least norm (Stock et al. 2019, arXiv 1902.10416). Units with nothing on one side keep their scale. Each
    network stops when its own scales have settled, so that it does not depend on the others.

    Args:
        collection: N networks.
        groups: of their architecture; those that are not balanceable, or not wholly in the collection, are left alone.
        sweeps: at most so many.

    Returns:
        The rescaled networks, and by what: group -> c, float64 (N, size).
    """
    balanceable = [group for group in groups.within(collection.tensors) if group.balanceable]
    scales = {group.name: torch.ones(len(collection), group.size, dtype=torch.float64) for group in balanceable}
    moving = torch.ones(len(collection), dtype=torch.bool)
    for _ in range(sweeps):
        largest = torch.zeros(len(collection), dtype=torch.float64)
        for group in balanceable:
            incoming, outgoing = (_norms(collection.tensors, group, incoming=side) for side in (True, False))
            scale = (outgoing / incoming).sqrt()
            scale = torch.where((incoming > 0) & (outgoing > 0) & moving[:, None], scale, 1.0)
            largest = largest.maximum(scale.log().abs().amax(dim=1))
            collection = rescale(collection, groups, {group.name: scale})
            scales[group.name] = scales[group.name] * scale
        moving = largest >= BALANCED
        if not moving.any():
            break
    return collection, scales


def rescale(collection: Collection, groups: Groups, scales: Mapping[str, Tensor]) -> Collection:
    """Multiply units by c > 0 where they are computed and by 1 / c where they are read.

    Args:
        collection: N networks.
        groups: of their architecture.
        scales: name of a group that may be rescaled -> c, float64 (N, size).
    """
    tensors = dict(collection.tensors)
    for group in (group for group in groups if group.name in scales):
        scale = scales[group.name]
        for place in group.places:
            stacked = tensors[place.name]
            factors = torch.ones(len(scale), stacked.shape[place.axis + 1], dtype=stacked.dtype)
            factors[:, place.index(group.size)] = (scale if place.incoming else 1 / scale)[:, :, None].to(stacked.dtype)
            tensors[place.name] = stacked * _along(factors, stacked, place.axis)
    return Collection(tensors, collection.names)


def _norms(tensors: Mapping[str, Tensor], group: Group, *, incoming: bool) -> Tensor:
    """The norm of every unit's incoming or outgoing weights, float64 (N, size)."""
    squares = torch.zeros((), dtype=torch.float64)
    for place in group.places:
        if place.incoming == incoming:
            rows = unit_rows(tensors[place.name], place.axis, place.index(group.size))
            squares = squares + rows.double().square().sum(-1)
    return squares.sqrt()


def _along(rows: Tensor, stacked: Tensor, axis: int) -> Tensor:
    """Values for each index of an axis, (N, n), with the dimensions of a stacked tensor."""
    shape = [1] * stacked.ndim
    shape[0], shape[axis + 1] = rows.shape
    return rows.reshape(shape)


def unit_rows(stacked: Tensor, axis: int, index: Tensor) -> Tensor:
    """All numbers of each unit along one axis.

    Args:
        stacked: (N, *shape).
        axis: of shape.
        index: of the units along the axis, int64 (size, m).

    Returns:
        (N, size, m * numbers of the other axes).
    """
    front = stacked.movedim(axis + 1, 1)
    if index.numel() != front.shape[1] or not torch.equal(index.flatten(), torch.arange(index.numel())):
        front = front.index_select(1, index.flatten().to(stacked.device))
    return front.reshape(len(stacked), len(index), front.shape[1:].numel() // max(1, len(index)))


def recombine(collection: Collection, parents: Tensor, groups: Groups, *, seed: int) -> Collection:
    """Networks in which every unit is that of one of several parents, slot by slot.

    A number belongs to the unit that it helps to compute: a weight (out, in) between hidden layers to its output unit.
    The columns of the last layer belong to the units that they read; numbers of no unit come from the first parent.

    Args:
        collection: N aligned networks.
        parents: rows of the collection, int64 (M, k).
        groups: of their architecture.
        seed: of the choices.

    Returns:
        M networks.
    """
    generator = torch.Generator().manual_seed(stream(seed, "recombine"))
    choices: dict[str, list[tuple[Place, Tensor]]] = {}
    for group in groups.within(collection.tensors):
        choice = torch.randint(parents.shape[1], (len(parents), group.size), generator=generator)
        for place in group.places:
            choices.setdefault(place.name, []).append((place, choice))
    mixed = empty(collection[0], len(parents))
    for name, stacked in collection.tensors.items():
        mixed[name].copy_(_mixed(stacked, parents, choices.get(name, [])))
    return Collection(mixed)


def _mixed(stacked: Tensor, parents: Tensor, choices: list[tuple[Place, Tensor]]) -> Tensor:
    """One stacked tensor, (N, *shape) -> (M, *shape), whose units are those of the chosen parents."""
    mixed = stacked[parents[:, 0]]
    computed = any(place.incoming for place, _ in choices)
    owners = [(place, choice) for place, choice in choices if place.incoming == computed]
    if not owners:
        return mixed
    axis = owners[0][0].axis
    parent = torch.zeros(len(parents), stacked.shape[axis + 1], dtype=torch.int64)
    for place, choice in owners:
        parent[:, place.index(choice.shape[1])] = choice[:, :, None]
    for j in range(1, parents.shape[1]):
        mixed = torch.where(_along(parent == j, mixed, axis), stacked[parents[:, j]], mixed)
    return mixed
