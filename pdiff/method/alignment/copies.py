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

QUANTILES = 64  # of the numbers of each tensor


class Originals:
    """Fitted networks, of which others may be copies.

    Where units are in several groups, matching to a common reference ends in one of many local optima. Noise of one
    percent is enough for a copy of a residual network to end in another one than its original, and to seem as new as an
    independent network. What no order of the units changes are the numbers of a tensor once they are sorted: they say
    which network to match it to directly, and a noisy copy is then found (see `Matching`).

    Args:
        fitted: aligned to a reference.
        reference: whose groups, and whose seed, the matching has.
        standardizer: of the fitted networks.
    """

    def __init__(self, fitted: Collection, reference: Reference, standardizer: Standardizer) -> None:
        self.fitted, self.reference, self.standardizer = fitted, reference, standardizer
        numbers = torch.cat([_sorted_numbers(part) for part in _chunks(fitted, range(len(fitted)))])
        std = numbers.std(0, correction=0)
        self.mean, self.std = numbers.mean(0), torch.where(std > 0, std, 1)
        self.numbers = (numbers - self.mean) / self.std

    def distances(self, networks: Collection) -> Tensor:
        """Distance of each network to the one whose numbers it resembles most, with its units matched to that one's.

        Every rank of a process group matches its part of the networks, which are aligned to the reference.

        Returns:
            Root mean squares over the parameters, in standard deviations of the weights, float32 (N,).
        """
        groups, found = self.reference.groups.within(networks.tensors), [torch.zeros(0)]
        for part in _chunks(networks, range(len(networks))[ranks.rows()]):
            numbers = (_sorted_numbers(part) - self.mean) / self.std
            originals = self.fitted.select(torch.cdist(numbers, self.numbers).argmin(1))
            permutations = Matching(originals.tensors, groups, seed=self.reference.seed).best(part.tensors)
            encode = self.standardizer.encode
            found.append((encode(permute(part, groups, permutations)) - encode(originals)).square().mean(1).sqrt())
        return ranks.gathered(torch.cat(found), len(networks))


def _sorted_numbers(networks: Collection) -> Tensor:
    """Quantiles of the numbers of every tensor, float32 (N, Q): the same in whatever order the units are."""
    found = []
    for tensor in networks.tensors.values():
        numbers = ascending(tensor.float().reshape(len(tensor), -1), 1)
        count = numbers.shape[1]
        found.append(numbers[:, torch.linspace(0, count - 1, min(count, QUANTILES)).long()] if count else numbers)
    return torch.cat(found, dim=1)


def _chunks(networks: Collection, rows: range) -> Iterator[Collection]:
    """Some networks, few large ones at a time."""
    most = max(1, CHUNK_BYTES // sum(tensor.numel() * tensor.element_size() for tensor in networks[0].values()))
    with tqdm(total=len(rows), desc="match", unit="network", dynamic_ncols=True, disable=None) as bar:
        for begin in range(0, len(rows), most):
            some = rows[begin : begin + most]
            yield networks.select(some)
            bar.update(len(some))
