"""Weight matching: permute the units of many networks towards one reference (Ainsworth et al. 2022, Git Re-Basin)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pdiff.method.alignment import groups as units
from pdiff.method.alignment.groups import Group, Groups, permute, permute_group, unit_rows
from pdiff.method.collection import Collection, StateDict
from pdiff.seeds import stream

CHUNK_BYTES = 256 << 20  # of the tensors of networks that are matched together
PROGRESS = 1e-6  # of the similarity of the reference to itself; less is rounding
SWEEPS = 100  # at most; a few suffice


def align(
    collection: Collection, reference: StateDict, groups: Groups, *, seed: int = 0
) -> tuple[Collection, dict[str, Tensor]]:
    """Permute the units of every network of a collection to where they resemble a reference most.

    Weight matching (arXiv 2209.04836, section 3.2): maximise the inner product of the permuted network and the
    reference, each tensor divided by its mean square over the reference, so that none dominates. One group at a time,
    the others held, this is an assignment problem, which is solved exactly; groups follow each other in random order
    until nothing changes. The best of several starts counts, so aligning twice changes nothing the second time.

    Args:
        collection: N networks.
        reference: one network of the same architecture.
        groups: of that architecture; those that are not wholly in the collection are left alone (`Groups.within`).
        seed: of the order of groups.

    Returns:
        The aligned networks, and the permutations that were applied: group -> int64 (N, size).
    """
    groups = groups.within(collection.tensors).within(reference)
    names = dict.fromkeys(place.name for group in groups for place in group.places)
    target = {name: _over_mean_square(reference[name].float()) for name in names}
    size = sum(4 * tensor.numel() for tensor in target.values())
    rows = torch.arange(len(collection)).split(max(1, CHUNK_BYTES // max(1, size)))
    parts = [_best({n: collection.tensors[n][part].float() for n in names}, target, groups, seed) for part in rows]
    permutations = {group.name: torch.cat([part[group.name] for part in parts]) for group in groups}
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

    Returns:
        Permutations, group -> (N, size), and the objective that each network reaches, float64 (N,).
    """
    generator = torch.Generator().manual_seed(seed)
    current, permutations = dict(tensors), dict(start)
    for group in groups:
        permute_group(current, group, start[group.name])
    moving = torch.arange(len(next(iter(tensors.values()), ())))
    for _ in range(SWEEPS):
        if not len(moving):
            break
        part = {name: tensor[moving] for name, tensor in current.items()}
        changed = torch.zeros(len(moving), dtype=torch.bool)
        for k in torch.randperm(len(groups), generator=generator).tolist():
            group = groups.groups[k]
            step = _step(part, target, group)
            moved = (step != units.identity(group, step)).any(dim=1)
            if moved.any():
                permute_group(part, group, step)
                permutations[group.name] = permutations[group.name].clone()
                permutations[group.name][moving] = permutations[group.name][moving].gather(1, step)
            changed |= moved
        for name, tensor in part.items():
            current[name] = current[name].index_copy(0, moving, tensor)
        moving = moving[changed]
    return permutations, _objective(current, target)


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

    matrices = similarity.double().cpu().numpy()
    columns = [torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1]) for matrix in matrices]
    return torch.stack(columns).to(similarity.device)


def _objective(tensors: StateDict, target: StateDict) -> Tensor:
    """Inner product of each network with the target over the tensors given, float64 (N,)."""
    return sum(tensor.flatten(1).matmul(target[name].flatten()).double() for name, tensor in tensors.items())
