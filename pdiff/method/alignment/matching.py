"""Weight matching: permute the units of many networks towards one reference (Ainsworth et al. 2022, Git Re-Basin)."""

from __future__ import annotations

from collections.abc import Mapping

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
    """Permute the units of every network of a collection to where they resemble a reference most.

    Weight matching (arXiv 2209.04836, section 3.2): maximise the inner product of the permuted network and the
    reference, each tensor divided by its mean square over the reference, so that none dominates. One group at a time,
    the others held, this is an assignment problem, which is solved exactly; groups follow each other in random order
    until nothing changes. The best of several starts counts, so aligning twice changes nothing the second time.

    Every rank of a process group matches its part of the networks; each has the result.

    Args:
        collection: N networks, which are matched all at once; `Reference.align` takes few of large ones at a time.
        reference: one network of the same architecture.
        groups: of that architecture; those that are not wholly in the collection are left alone (`Groups.within`).
        seed: of the order of groups.

    Returns:
        The aligned networks, and the permutations that were applied: group -> int64 (N, size).
    """
    groups = groups.within(collection.tensors).within(reference)
    names = dict.fromkeys(place.name for group in groups for place in group.places)
    target = {name: _over_mean_square(reference[name].float()) for name in names}
    mine = {name: collection.tensors[name][ranks.rows()].float() for name in names}
    found = _best(mine, target, groups, seed)
    permutations = {name: ranks.gathered(rows, len(collection)) for name, rows in found.items()}
    return permute(collection, groups, permutations), permutations


def _over_mean_square(tensor: Tensor) -> Tensor:
    """A tensor over its mean square; zeros remain zeros."""
    return tensor / tensor.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _best(tensors: StateDict, target: StateDict, groups: Groups, seed: int) -> dict[str, Tensor]:
    """The best permutations that coordinate descent finds from each start, group -> (N, size).

    From the identity alone, descent is lost in residual networks: a residual stream meets only tensors whose other side
    is not aligned yet, so all its units look alike, and the first steps fix a random match that no later step leaves.
    `_signatures` compares units by what no permutation of other groups changes. Where a network is a permuted copy of
    the reference, even a noisy one, this start is the solution, or close to it; where networks come from one run, the
    identity is.
    """
    count = len(next(iter(tensors.values()), ()))
    found = {group.name: torch.arange(group.size).repeat(count, 1) for group in groups}
    best = torch.full((count,), -torch.inf, dtype=torch.float64)
    tolerance = PROGRESS * sum(tensor.numel() for tensor in target.values())
    for k, start in enumerate((found, _signatures(tensors, target, groups))):
        permutations, objective = _descend(tensors, target, groups, start, seed=stream(seed, k))
        better = objective > best + tolerance
        best = torch.where(better, objective, best)
        found = {name: torch.where(better[:, None], permutations[name], rows) for name, rows in found.items()}
    return found


def _descend(
    tensors: StateDict, target: StateDict, groups: Groups, start: Mapping[str, Tensor], *, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Coordinate descent over the groups in random order, until nothing changes.

    A step is repeated only where it can gain: after a change of a group that shares a tensor with it.

    Returns:
        Permutations, group -> (N, size), and the objective that each network reaches, float64 (N,).
    """
    generator = torch.Generator().manual_seed(seed)
    current, permutations = dict(tensors), {name: rows.clone() for name, rows in start.items()}
    for group in groups:
        permute_group(current, group, start[group.name])
    count = len(next(iter(tensors.values()), ()))
    names = {group.name: {place.name for place in group.places} for group in groups}
    stale = {group.name: torch.ones(count, dtype=torch.bool) for group in groups}
    for _ in range(SWEEPS):
        if not any(rows.any() for rows in stale.values()):
            break
        for k in torch.randperm(len(groups), generator=generator).tolist():
            group = groups.groups[k]
            rows = stale[group.name].nonzero()[:, 0]
            stale[group.name][rows] = False
            if not len(rows):
                continue
            part = {name: _rows(current[name], rows) for name in names[group.name]}
            step = _step(part, target, group)
            moved = (step != units.identity(group, step)).any(dim=1)
            if not moved.any():
                continue
            permute_group(part, group, step)
            current |= {name: current[name].index_copy(0, rows, tensor) for name, tensor in part.items()}
            permutations[group.name][rows] = permutations[group.name][rows].gather(1, step)
            for other, theirs in names.items():  # among them the group itself: it may be on both sides of a tensor
                if theirs & names[group.name]:
                    stale[other][rows[moved]] = True
    return permutations, _objective(current, target)


def _rows(stacked: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a stacked tensor; a view of all."""
    return stacked if len(rows) == len(stacked) else stacked[rows]


def _step(tensors: StateDict, target: StateDict, group: Group) -> Tensor:
    """The best permutation of one group while all others are held; the identity where it gains nothing, (N, size)."""
    names = [name for name, _ in group.axes()]
    similarity = _similarity(tensors, target, group, {})
    step = _assignments(similarity)
    if len(set(names)) == len(names):
        gain = (similarity.gather(2, step[:, :, None]).squeeze(2) - similarity.diagonal(dim1=1, dim2=2)).sum(1)
    else:  # the group is on both sides of a tensor: its similarity was taken with the other side held
        before = {name: tensors[name] for name in names}
        after = dict(before)
        permute_group(after, group, step)
        gain = _objective(after, target) - _objective(before, target)
    tolerance = PROGRESS * sum(target[name].numel() for name in set(names))
    return torch.where((gain > tolerance)[:, None], step, units.identity(group, step))


def _signatures(tensors: StateDict, target: StateDict, groups: Groups) -> dict[str, Tensor]:
    """Match units by their numbers, sorted along the axes that any group permutes; group -> (N, size).

    Least squares on sorted numbers: squared norms add the same to every assignment, so inner products suffice.
    """
    permuted: dict[str, set[int]] = {}
    for group in groups:
        for name, axis in group.axes():
            permuted.setdefault(name, set()).add(axis)
    return {group.name: _assignments(_similarity(tensors, target, group, permuted)) for group in groups}


def _similarity(tensors: StateDict, target: StateDict, group: Group, unordered: Mapping[str, set[int]]) -> Tensor:
    """Inner products of the units of the target and those of each network, (N, size, size).

    Args:
        tensors: of the networks, (N, *shape).
        target: (*shape).
        group: of the units.
        unordered: tensor -> axes along which numbers are sorted before, except the unit's own.
    """
    total = torch.zeros(())
    for (name, axis), index in group.axes().items():
        others = unordered.get(name, set()) - {axis}
        a, b = (unit_rows(_sorted(x, others), axis, index) for x in (target[name][None], tensors[name]))
        total = total + torch.einsum("if,njf->nij", a[0], b)
    return total


def _sorted(stacked: Tensor, axes: set[int]) -> Tensor:
    """Stacked tensors, (N, *shape), each sorted along some axes, one after the other."""
    for axis in sorted(axes):
        stacked = stacked.sort(dim=axis + 1).values
    return stacked


def _assignments(similarity: Tensor) -> Tensor:
    """Which column each row takes so that the sum is largest, for each of (N, size, size); int64 (N, size)."""
    from scipy.optimize import linear_sum_assignment

    columns = torch.empty(similarity.shape[:2], dtype=torch.int64)  # no rows where ranks outnumber the networks
    for row, matrix in zip(columns, similarity.double().cpu().numpy(), strict=True):
        row.copy_(torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1]))
    return columns.to(similarity.device)


def _objective(tensors: StateDict, target: StateDict) -> Tensor:
    """Inner product of each network with the target over the tensors given, float64 (N,)."""
    return sum(tensor.flatten(1).matmul(target[name].flatten()).double() for name, tensor in tensors.items())
