"""Weight matching: permute the units of many networks towards one reference (Ainsworth et al. 2022, Git Re-Basin)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from pdiff.method.alignment import groups as units
from pdiff.method.alignment.groups import Group, Groups, permute, permute_group, unit_rows
from pdiff.method.collection import Collection, StateDict
from pdiff.parallel import ranks
from pdiff.seeds import stream

PROGRESS = 1e-6  # of the similarity of the reference to itself; less is rounding
SWEEPS = 100  # at most; about ten suffice


def align(
    collection: Collection, reference: StateDict, groups: Groups, *, seed: int = 0
) -> tuple[Collection, dict[str, Tensor]]:
    """Permute the units of every network of a collection to where they resemble a reference most; see `Matching`.

    Args:
        collection: N networks, which are matched all at once; `Reference.align` takes few of large ones at a time.
        reference: one network of the same architecture.
        groups: of that architecture; those that are not wholly in the collection are left alone (`Groups.within`).
        seed: of the order of groups.

    Returns:
        The aligned networks, and the permutations that were applied: group -> int64 (N, size).
    """
    references = {name: tensor[None] for name, tensor in reference.items()}
    return Matching(references, groups.within(collection.tensors), seed=seed).align(collection)


class Matching:
    """Weight matching (arXiv 2209.04836, section 3.2) of networks to one reference, or to one of each.

    Maximise the inner product of the permuted network and the reference, each tensor divided by its mean square over
    the reference, so that none dominates. One group at a time, the others held, this is an assignment problem, which is
    solved exactly; groups follow each other in random order until nothing changes. The best of several starts counts,
    so aligning twice changes nothing the second time.

    Args:
        references: stacked tensors, (1, *shape), or (N, *shape) with one reference of each network.
        groups: of their architecture; those that are not wholly in a reference are left alone.
        seed: of the order of groups.
    """

    def __init__(self, references: StateDict, groups: Groups, *, seed: int) -> None:
        self.groups, self.seed = groups.within(references), seed
        self.names = {group.name: {place.name for place in group.places} for group in self.groups}
        names = dict.fromkeys(place.name for group in self.groups for place in group.places)
        self.target = {name: _over_mean_square(references[name].float()) for name in names}
        self.tolerance = {name: PROGRESS * target[0].numel() for name, target in self.target.items()}
        self._permuted: dict[str, set[int]] = {}
        for group in self.groups:
            for name, axis in group.axes():
                self._permuted.setdefault(name, set()).add(axis)
        self._sorted_target = {group.name: list(self._sorted(self.target, group)) for group in self.groups}

    def align(self, collection: Collection) -> tuple[Collection, dict[str, Tensor]]:
        """Networks that hold all groups, permuted to one reference; and their permutations, group -> int64 (N, size).

        Every rank of a process group matches its part of the networks; each has the result.
        """
        mine = {name: collection.tensors[name][ranks.rows()] for name in self.target}
        permutations = {name: ranks.gathered(rows, len(collection)) for name, rows in self.best(mine).items()}
        return permute(collection, self.groups, permutations), permutations

    def best(self, tensors: StateDict) -> dict[str, Tensor]:
        """The best permutations that coordinate descent finds from each start, group -> (N, size).

        From the identity alone, descent is lost in residual networks: a residual stream meets only tensors whose other
        side is not aligned yet, so all its units look alike, and the first steps fix a random match that no later step
        leaves. The other start compares units by what no permutation of other groups changes, their sorted numbers.
        Where a network is a permuted copy of the reference, even a noisy one, that is the solution, or close to it;
        where networks come from one run, the identity is.
        """
        tensors = {name: tensors[name].float() for name in self.target}
        count = len(next(iter(tensors.values()), ()))
        found = {group.name: torch.arange(group.size).repeat(count, 1) for group in self.groups}
        best = torch.full((count,), -torch.inf, dtype=torch.float64)
        tolerance = sum(self.tolerance.values())
        for k, start in enumerate((found, self._matched_when_sorted(tensors))):
            permutations, objective = self._descend(tensors, start, seed=stream(self.seed, k))
            better = objective > best + tolerance
            best = torch.where(better, objective, best)
            found = {name: torch.where(better[:, None], permutations[name], rows) for name, rows in found.items()}
        return found

    def _descend(
        self, tensors: StateDict, start: Mapping[str, Tensor], *, seed: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Coordinate descent over the groups in random order, until nothing changes.

        A step is repeated only where it can gain: after a change of a group that shares a tensor with it.

        Returns:
            Permutations, group -> (N, size), and the objective that each network reaches, float64 (N,).
        """
        generator = torch.Generator().manual_seed(seed)
        descent = _Descent(self, tensors, start)
        count = len(next(iter(tensors.values()), ()))
        stale = {group.name: torch.ones(count, dtype=torch.bool) for group in self.groups}
        for _ in range(SWEEPS):
            if not any(rows.any() for rows in stale.values()):
                break
            for k in torch.randperm(len(self.groups), generator=generator).tolist():
                group = self.groups.groups[k]
                rows = stale[group.name].nonzero()[:, 0]
                stale[group.name][rows] = False
                if not len(rows):
                    continue
                moved = descent.step(group, rows)
                for other, theirs in self.names.items():  # the group itself, too: it may be on both sides of a tensor
                    if theirs & self.names[group.name]:
                        stale[other][moved] = True
        return descent.permutations, _objective(descent.tensors, self.target)

    def _matched_when_sorted(self, tensors: StateDict) -> dict[str, Tensor]:
        """Match units by their numbers, sorted along the axes that any group permutes; group -> (N, size).

        Least squares on sorted numbers: squared norms add the same to every assignment, so inner products suffice.
        """
        found = {}
        for group in self.groups:
            sides = zip(self._sorted_target[group.name], self._sorted(tensors, group), strict=True)
            found[group.name] = _assignments(sum(_products(target, networks) for target, networks in sides))
        return found

    def _sorted(self, tensors: StateDict, group: Group) -> Iterator[Tensor]:
        """The numbers of every unit along each axis of a group, sorted along the axes of others, (N, size, m)."""
        for (name, axis), index in group.axes().items():
            stacked = tensors[name]
            for other in sorted(self._permuted[name] - {axis}):
                stacked = ascending(stacked, other + 1)
            yield unit_rows(stacked, axis, index)


class _Descent:
    """Networks on their way to the reference, with the similarities of their units.

    The similarities of a group are computed once. A step of another group changes them by what the units that it moved
    contribute: few, in most steps.

    Attributes:
        tensors: (N, *shape), permuted so far.
        permutations: group -> int64 (N, size), so far.
    """

    def __init__(self, matching: Matching, tensors: StateDict, start: Mapping[str, Tensor]) -> None:
        self.groups, self.names, self.target = matching.groups, matching.names, matching.target
        self.tolerance = matching.tolerance
        self.tensors, self.permutations = dict(tensors), {name: rows.clone() for name, rows in start.items()}
        for group in self.groups:
            permute_group(self.tensors, group, start[group.name])
        self._known: dict[str, Tensor] = {}  # group -> (N, size, size)
        self._holds: dict[str, Tensor] = {}  # group -> for which networks it does, bool (N,)

    def step(self, group: Group, rows: Tensor) -> Tensor:
        """Permute a group of some networks as is best while all others are held; where that gains something.

        Returns:
            The networks that it changed, int64, some of the rows.
        """
        similarity = self._similarity(group, rows)
        step = _assignments(similarity)
        before = {name: _rows(self.tensors[name], rows) for name in self.names[group.name]}
        if _on_one_side(group):
            gain = (similarity.gather(2, step[:, :, None]).squeeze(2) - similarity.diagonal(dim1=1, dim2=2)).sum(1)
        else:  # the group is on both sides of a tensor: its similarity was taken with the other side held
            after = dict(before)
            permute_group(after, group, step)
            target = {name: _targets(self.target[name], rows) for name in before}
            gain = _objective(after, target) - _objective(before, target)
        tolerance = sum(self.tolerance[name] for name in before)
        moved = ((gain > tolerance) & (step != units.identity(group, step)).any(dim=1)).nonzero()[:, 0]
        if len(moved):
            self._move(group, rows[moved], step[moved], {name: _rows(tensor, moved) for name, tensor in before.items()})
        return rows[moved]

    def _move(self, group: Group, rows: Tensor, step: Tensor, before: StateDict) -> None:
        """Take a step; `before` are the tensors of the group."""
        after = dict(before)
        permute_group(after, group, step)
        for other in (other for other in self.groups if other.name in self._known):
            if other is not group:
                self._follow(other, group, rows, step, before, after)
            elif _on_one_side(group):
                known = _rows(self._known[group.name], rows)
                self._known[group.name][rows] = known.gather(2, step[:, None].expand_as(known))
            else:
                self._holds[group.name][rows] = False
        for name, tensor in after.items():
            whole = len(rows) == len(self.tensors[name])
            self.tensors[name] = tensor if whole else self.tensors[name].index_copy_(0, rows, tensor)
        self.permutations[group.name][rows] = self.permutations[group.name][rows].gather(1, step)

    def _follow(
        self, other: Group, group: Group, rows: Tensor, step: Tensor, before: StateDict, after: StateDict
    ) -> None:
        """Change the similarities of another group as a step of a group in its tensors changes them."""
        shared = [(*key, index) for key, index in other.axes().items() if key[0] in before]
        moved = (step != units.identity(group, step)).any(dim=0).nonzero()[:, 0]
        if shared and (2 * len(moved) > group.size or not _on_one_side(group)):
            self._holds[other.name][rows] = False  # to compute them anew is cheaper, or else there is no other way
            return
        for name, axis, index in shared:
            for side, places in (
                (side, places) for (n, side), places in group.axes().items() if n == name and side != axis
            ):
                part = places[moved].flatten()
                change = after[name].index_select(side + 1, part) - before[name].index_select(side + 1, part)
                target = _targets(self.target[name], rows).index_select(side + 1, part)
                self._known[other.name][rows] += _products(*(unit_rows(x, axis, index) for x in (target, change)))

    def _similarity(self, group: Group, rows: Tensor) -> Tensor:
        """Inner products of the units of the target and those of some networks, (len(rows), size, size)."""
        if group.name not in self._known:
            count = len(self.permutations[group.name])
            self._known[group.name] = torch.empty(count, group.size, group.size)
            self._holds[group.name] = torch.zeros(count, dtype=torch.bool)
        known, holds = self._known[group.name], self._holds[group.name]
        if len(missing := rows[~holds[rows]]):
            mine = {name: _rows(self.tensors[name], missing) for name in self.names[group.name]}
            known[missing] = sum(
                _products(unit_rows(_targets(self.target[n], missing), axis, i), unit_rows(mine[n], axis, i))
                for (n, axis), i in group.axes().items()
            )
            holds[missing] = True
        return _rows(known, rows)


def _on_one_side(group: Group) -> bool:
    """Whether a group stands along one axis of each of its tensors."""
    names = [name for name, _ in group.axes()]
    return len(set(names)) == len(names)


def _over_mean_square(stacked: Tensor) -> Tensor:
    """Each of some tensors over its mean square; zeros remain zeros."""
    squares = stacked.flatten(1).square().mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    return stacked / squares.view(-1, *[1] * (stacked.ndim - 1))


def _targets(target: Tensor, rows: Tensor) -> Tensor:
    """What some networks are matched to: one for all, or one of each."""
    return target if len(target) == 1 else _rows(target, rows)


def _rows(stacked: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a stacked tensor, ascending; a view of all."""
    return stacked if len(rows) == len(stacked) else stacked[rows]


def _products(target: Tensor, networks: Tensor) -> Tensor:
    """Inner products of units of one target or of N, (1 or N, size, m), and of networks, (N, size, m)."""
    return torch.einsum("if,njf->nij", target[0], networks) if len(target) == 1 else target @ networks.mT


def ascending(stacked: Tensor, axis: int) -> Tensor:
    """Numbers sorted along an axis: by NumPy, which takes a tenth of the time, for it moves no indices."""
    return torch.from_numpy(np.sort(stacked.cpu().numpy(), axis=axis)).to(stacked.device)


def _assignments(similarity: Tensor) -> Tensor:
    """Which column each row takes so that the sum is largest, for each of (N, size, size); int64 (N, size)."""
    from scipy.optimize import linear_sum_assignment

    columns = similarity.argmax(dim=2)
    for row, matrix in zip(columns, similarity, strict=True):
        if len(row.unique()) < len(row):  # otherwise no row could have more
            row.copy_(torch.from_numpy(linear_sum_assignment(matrix.double().cpu().numpy(), maximize=True)[1]))
    return columns


def _objective(tensors: StateDict, target: StateDict) -> Tensor:
    """Inner product of each network with its target over the tensors given, float64 (N,)."""
    pairs = ((tensor.flatten(1), target[name].flatten(1)) for name, tensor in tensors.items())
    return sum((x @ y[0] if len(y) == 1 else torch.einsum("nd,nd->n", x, y)).double() for x, y in pairs)
