"""Copies of fitted networks with their units in another order, and with noise, find their originals."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pdiff.method.alignment.groups import permute
from pdiff.method.alignment.matching import Matching, ascending
from pdiff.method.alignment.reference import CHUNK_BYTES, Reference
from pdiff.method.collection import Collection
from pdiff.method.standardize import Standardizer
from pdiff.parallel import ranks

QUANTILES = 256  # of the numbers of each tensor


def distances_to_originals(
    networks: Collection, fitted: Collection, reference: Reference, standardizer: Standardizer
) -> Tensor:
    """Distance of each network to the fitted one whose numbers it resembles most, with its units matched to that one's.

    Where units are in several groups, matching to a common reference ends in one of many local optima. Noise of one
    percent is enough for a copy of a residual network to end in another one than its original, and to seem as new as an
    independent network. What no order of the units changes are the numbers of a tensor once they are sorted: they say
    which network to match it to directly, and a noisy copy is then found (see `Matching`).

    Args:
        networks: aligned to the reference; `fitted` itself for the distance of each to another one.
        fitted: aligned to it, too.
        reference: whose groups, and whose seed, the matching has.
        standardizer: of the fitted networks.

    Returns:
        Root mean squares over the parameters, in standard deviations of the weights, float32 (N,); infinite where there
        is nothing to match.
    """
    groups, same = reference.groups.within(networks.tensors), networks is fitted
    found = torch.full((len(networks),), torch.inf)[ranks.rows()]
    if groups and len(fitted) > same:
        signatures = torch.cat([_signatures(part) for _, part in _chunks(fitted, range(len(fitted)))])
        mean, std = signatures.mean(0), signatures.std(0, correction=0)
        std = torch.where(std > 0, std, 1)
        mine, done = range(len(networks))[ranks.rows()], 0
        for rows, part in _chunks(networks, mine):
            distances = torch.cdist((_signatures(part) - mean) / std, (signatures - mean) / std)
            if same:
                distances[range(len(rows)), rows] = torch.inf
            originals = fitted.select(distances.argmin(1))
            permutations = Matching(originals.tensors, groups, seed=reference.seed).best(part.tensors)
            apart = standardizer.encode(permute(part, groups, permutations)) - standardizer.encode(originals)
            found[done : done + len(rows)] = apart.square().mean(1).sqrt()
            done += len(rows)
    return ranks.gathered(found, len(networks))


def _signatures(networks: Collection) -> Tensor:
    """Quantiles of the numbers of every tensor, float32 (N, Q): the same in whatever order the units are."""
    found = []
    for tensor in networks.tensors.values():
        numbers = ascending(tensor.float().reshape(len(tensor), -1), 1)
        count = numbers.shape[1]
        found.append(numbers[:, torch.linspace(0, count - 1, min(count, QUANTILES)).long()] if count else numbers)
    return torch.cat(found, dim=1)


def _chunks(networks: Collection, rows: range) -> Iterator[tuple[range, Collection]]:
    """Some networks, few large ones at a time."""
    most = max(1, CHUNK_BYTES // sum(tensor.numel() * tensor.element_size() for tensor in networks[0].values()))
    with tqdm(total=len(rows), desc="match", unit="network", dynamic_ncols=True, disable=None) as bar:
        for begin in range(0, len(rows), most):
            some = rows[begin : begin + most]
            yield some, networks.select(some)
            bar.update(len(some))
