"""What is known about the units of a network while its graph is read, and the groups that follow from it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from pdiff.method.alignment.groups import Group, Groups, Place

OUTSIDE = ""  # why inputs and outputs of the network are not permuted; not reported


class Units:
    """Units are numbered from 1. Each index of an axis of a tensor belongs to one.

    Attributes:
        tensors: the floating tensors of the state dict.
    """

    def __init__(self, network: nn.Module) -> None:
        state = {n: t for n, t in network.state_dict(keep_vars=True).items() if t.is_floating_point()}
        first: dict[int, str] = {}
        self._first = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
        self.tensors = state
        self._count = 0
        self._axes: dict[tuple[str, int], Tensor] = {}
        self._incoming: set[tuple[str, int]] = set()
        self._elements: dict[str, Tensor] = {}
        self._opaque: dict[str, str] = {}
        self._ties: list[Tensor] = []
        self._fixed: list[tuple[Tensor, str]] = []
        self._marks: list[tuple[Tensor, Tensor, str]] = []
        self._scaled: list[Tensor] = []

    def new(self, count: int) -> Tensor:
        """New units, int64 (count,)."""
        self._count += count
        return torch.arange(self._count - count + 1, self._count + 1)

    def axis(self, name: str, axis: int, *, incoming: bool = True) -> Tensor:
        """The unit of every index along one axis of a tensor, as often as it is asked for."""
        key = (self._first[name], axis)
        if key not in self._axes:
            self._axes[key] = self.new(self.tensors[name].shape[axis])
        if incoming:
            self._incoming.add(key)
        return self._axes[key]

    def elements(self, name: str) -> Tensor:
        """The unit of every number of a tensor."""
        tensor = self.tensors[name]
        if tensor.ndim == 1:
            return self.axis(name, 0)
        name = self._first[name]
        if name not in self._elements:
            self._elements[name] = self.new(tensor.numel()).reshape(tensor.shape)
        return self._elements[name]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Units that stand at the same index of two label tensors are one."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a > 0) & (b > 0) & (a != b)
        if both.any():
            self._ties.append(torch.stack([a[both], b[both]]).unique(dim=1))

    def bind(self, units: Tensor, labels: Tensor) -> None:
        """Units of a weight are those that it reads; where it reads none, they are fixed."""
        self.tie(units, labels)
        self.fix(units[labels <= 0], OUTSIDE)

    def fix(self, labels: Tensor, reason: str) -> None:
        """Units that are not permuted."""
        self._fixed.append((_distinct(labels), reason))

    def opaque(self, name: str, reason: str) -> None:
        """Fix all units of a tensor that is used in a way that is not understood."""
        if name in self._first:
            self._opaque.setdefault(self._first[name], reason)

    def mark(self, labels: Tensor, keys: Tensor | int, reason: str) -> None:
        """Only units with the same multiset of keys are alike; keys of different calls are different.

        Args:
            labels: any shape; those that are no units do not count.
            keys: int64, broadcast with the labels.
            reason: what tells units with different keys apart.
        """
        labels, keys = torch.broadcast_tensors(labels, torch.as_tensor(keys))
        found = labels > 0
        if found.any():
            self._marks.append((labels[found], keys[found], reason))

    def scaled(self, labels: Tensor) -> None:
        """Units whose scale matters, as what reads them is not positively homogeneous."""
        self._scaled.append(_distinct(labels))

    def groups(self) -> Groups:
        """The groups of units that nothing tells apart."""
        self._place_elements()
        roots = self._roots()
        axes = {key: roots[labels.numpy()] for key, labels in self._axes.items()}
        fixed = self._fixed_roots(roots)
        alike = _fingerprints(self._marks, roots, len(roots))
        scaled = np.unique(roots[torch.cat([*self._scaled, torch.zeros(1, dtype=torch.int64)]).numpy()])
        ours = np.unique(np.concatenate([*axes.values(), [0]]))
        ours = ours[(ours > 0) & ~np.isin(ours, list(fixed))]
        found, failed = [], {}
        for fingerprint in dict.fromkeys(alike[ours].tolist()):
            members = ours[alike[ours] == fingerprint]
            places = self._places(axes, members) if len(members) > 1 else ()
            if not places:
                reason = "its units do not stand in regular blocks" if len(members) > 1 else None
                failed |= dict.fromkeys(members.tolist(), reason)
                continue
            name = next(place.name for place in places if place.incoming)
            taken = sum(group.name.split("@")[0] == name for group in found)
            balanceable = not np.isin(members, scaled).any() and not all(place.incoming for place in places)
            found.append(Group(f"{name}@{taken}" if taken else name, len(members), places, balanceable))
        return Groups(tuple(found), self._left_alone(axes, fixed, failed, roots))

    def _place_elements(self) -> None:
        """Find the axis along which the units of tensors with labels for each number vary, once all ties are known."""
        roots = self._roots()
        for name, labels in self._elements.items():
            found = torch.from_numpy(roots[labels.numpy()])
            varying = [axis for axis in range(found.ndim) if (found != found.narrow(axis, 0, 1)).any()]
            if len(varying) > 1 or any(key[0] == name for key in self._axes):
                self.fix(labels, f"{name} has units along several axes")
                varying = varying[:1]
            axis = varying[0] if varying else found.ndim - 1
            self._axes[name, axis] = labels.movedim(axis, 0).flatten(1)[:, 0]
            self._incoming.add((name, axis))
        for (name, _), labels in self._axes.items():
            if name in self._opaque:
                self.fix(labels, self._opaque[name])
            self.mark(labels, 0, f"they stand on different indices of {name}")

    def _roots(self) -> np.ndarray:
        """The representative of each unit among those that are one with it, (units + 1,); that of 0 is 0."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        a, b = torch.cat([*self._ties, torch.zeros(2, 1, dtype=torch.int64)], dim=1).numpy()
        size = self._count + 1
        _, component = connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), (size, size)), directed=False)
        _, first = np.unique(component, return_index=True)
        return first[component]

    def _fixed_roots(self, roots: np.ndarray) -> dict[int, str]:
        """Roots that are not permuted, with the first reason that is one to report."""
        found: dict[int, str] = {}
        for labels, reason in self._fixed:
            for root in np.unique(roots[labels.numpy()]).tolist():
                found[root] = found.get(root) or reason
        return found

    def _places(self, axes: dict[tuple[str, int], np.ndarray], members: np.ndarray) -> tuple[Place, ...]:
        """Where units stand, or nothing where they do not stand in regular blocks."""
        here = [key for key, units in axes.items() if (units == members[0]).any()]
        order: np.ndarray | None = None  # members by their place in the first tensor that computes them
        places: list[Place] = []
        for name, axis in sorted(here, key=lambda key: key not in self._incoming):
            units = axes[name, axis]
            at = np.flatnonzero(np.isin(units, members))
            owner = np.searchsorted(members, units[at])
            if order is None:
                order = np.argsort(np.unique(owner, return_index=True)[1])
            rank = np.argsort(order)[owner]
            index = at[np.argsort(rank, kind="stable")].reshape(len(members), -1)
            runs = _runs(index)
            if runs is None:
                return ()
            for alias in (alias for alias, first in self._first.items() if first == name):
                places += [Place(alias, axis, start, block, (name, axis) in self._incoming) for start, block in runs]
        return tuple(places) if any(place.incoming for place in places) else ()

    def _left_alone(self, axes: dict, fixed: dict[int, str], failed: dict[int, str | None], roots: np.ndarray) -> dict:
        """Tensor -> why units of it are not permuted."""
        left: dict[str, str] = {}
        for (name, axis), units in axes.items():
            reasons = [fixed[root] for root in dict.fromkeys(units.tolist()) if fixed.get(root)]
            single = np.array([root for root in dict.fromkeys(units.tolist()) if root in failed])
            if not reasons and len(single):
                reasons = [failed[single[0]] or self._difference(single, roots)]
            if reasons:
                left.setdefault(name, f"axis {axis}: {reasons[0]}")
        return left

    def _difference(self, members: np.ndarray, roots: np.ndarray) -> str:
        """What first tells some units apart."""
        for mark in self._marks:
            if len(np.unique(_fingerprints([mark], roots, len(roots))[members])) > 1:
                return mark[2]
        return "all its indices belong to one unit"


def _distinct(labels: Tensor) -> Tensor:
    """The units among labels, each once."""
    return labels[labels > 0].unique()


def _fingerprints(marks: Iterable[tuple[Tensor, Tensor, str]], roots: np.ndarray, size: int) -> np.ndarray:
    """A hash of all the keys of every root, uint64 (size,): the sum of random numbers, one for each (mark, key)."""
    total = np.zeros(size, np.uint64)
    for k, (labels, keys, _) in enumerate(marks):
        distinct, which = np.unique(keys.numpy(), return_inverse=True)
        numbers = np.random.default_rng(k).integers(0, 2**64 - 1, len(distinct), np.uint64)
        np.add.at(total, roots[labels.numpy()], numbers[which])
    return total


def _runs(index: np.ndarray) -> list[tuple[int, int]] | None:
    """Split the indices of units, (size, m), into regular blocks.

    Returns:
        (start, block) of each, such that unit k has the indices from start + k * block on; None where there are none.
    """
    cuts = np.flatnonzero(np.diff(index[0]) != 1) + 1
    found = []
    for part in np.split(index, cuts, axis=1):
        size, block = part.shape
        if not np.array_equal(part, part[0, 0] + np.arange(size * block).reshape(size, block)):
            return None
        found.append((int(part[0, 0]), block))
    return found
