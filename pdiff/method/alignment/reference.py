"""`Reference`: what the networks of a population are aligned to, the same for originals and generated networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pdiff.files import read_tensors, write_tensors
from pdiff.method.alignment import groups as units
from pdiff.method.alignment.groups import Groups, inverse, permute
from pdiff.method.alignment.matching import Matching
from pdiff.method.collection import Collection, StateDict, empty
from pdiff.parallel import ranks

CHUNK_BYTES = 64 << 20  # of the tensors of networks that are aligned together
PERMUTATION, SCALE, STATE = "permutation/", "scale/", "reference/"  # prefixes of the tensors in a file


@dataclass(frozen=True)
class Changes:
    """How networks were aligned: unit i of an aligned network is scale[i] times unit permutation[i] of the network.

    Attributes:
        permutations: group -> int64 (N, size).
        scales: group -> float64 (N, size) by which units were multiplied where they are computed, in the old order;
            none where networks were not balanced.
    """

    permutations: dict[str, Tensor]
    scales: dict[str, Tensor]

    @classmethod
    def concatenate(cls, parts: Sequence[Changes]) -> Changes:
        """Those of several groups of networks, one after the other."""
        permutations, scales = [part.permutations for part in parts], [part.scales for part in parts]
        return cls(*({name: torch.cat([p[name] for p in of]) for name in of[0]} for of in (permutations, scales)))

    def undo(self, aligned: Collection, groups: Groups) -> Collection:
        """The networks as they were: the order of their units exactly, their numbers to rounding."""
        back = permute(aligned, groups.within(aligned.tensors), inverse(self.permutations))
        return units.rescale(back, groups, {name: 1 / scale for name, scale in self.scales.items()})


@dataclass(frozen=True)
class Reference:
    """A network that others are aligned to.

    Attributes:
        state: its tensors.
        groups: the units of the architecture that may be permuted.
        balance: whether networks are first rescaled to equal norms on both sides of every unit (`groups.balance`).
        seed: of the matching.
    """

    state: StateDict
    groups: Groups
    balance: bool
    seed: int

    @classmethod
    def fit(
        cls, collection: Collection, groups: Groups, *, balance: bool, seed: int, rows: Tensor | None = None
    ) -> Reference:
        """The mean of the networks of a collection, or of some of its rows, once they are aligned to the first one.

        One assignment to the mean is more faithful than one to any network: the noise of single networks is averaged
        out (as in the merging of many models; Ainsworth et al. 2022, arXiv 2209.04836, section A.11).
        """
        rows = torch.arange(len(collection)) if rows is None else rows
        first = cls(collection[int(rows[0])], groups, balance, seed)
        totals = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in first.state.items() if t.is_floating_point()}
        for _, aligned, _ in first.chunks(collection, rows):
            for name, total in totals.items():
                total += aligned.tensors[name].sum(0, dtype=torch.float64)
        mean = {name: (total / len(rows)).to(first.state[name].dtype) for name, total in totals.items()}
        return cls(first.state | mean, groups, balance, seed)

    def align(self, collection: Collection) -> tuple[Collection, Changes]:
        """Networks with their units in the order of the reference; they compute what they did."""
        tensors = empty(collection[0], len(collection))
        found = []
        for rows, aligned, changes in self.chunks(collection, torch.arange(len(collection))):
            for name, tensor in aligned.tensors.items():
                tensors[name][rows] = tensor
            found.append(changes)
        return Collection(tensors, collection.names), Changes.concatenate(found)

    def chunks(self, collection: Collection, rows: Tensor) -> Iterator[tuple[Tensor, Collection, Changes]]:
        """Some networks, aligned, and how; few large ones at a time, so that memory does not grow with N.

        Args:
            collection: of the networks.
            rows: of these, int64.

        Yields:
            Rows, the networks there, and their changes.
        """
        references = {name: tensor[None] for name, tensor in self.state.items()}
        matching = Matching(references, self.groups.within(collection.tensors), seed=self.seed)
        size = sum(tensor.numel() * tensor.element_size() for tensor in collection[0].values())
        most = max(ranks.world(), CHUNK_BYTES // size)
        with tqdm(total=len(rows), desc="align", unit="network", dynamic_ncols=True, disable=None) as bar:
            for some in rows.split(most):
                first, last = int(some[0]), int(some[-1])
                whole = slice(first, last + 1) if last - first == len(some) - 1 else some  # a slice copies nothing
                part, scales = collection.select(whole), {}
                if self.balance:
                    part, scales = units.balance(part, self.groups)
                aligned, permutations = matching.align(part)
                yield some, aligned, Changes(permutations, scales)
                bar.update(len(part))

    def save(self, path: Path, changes: Changes) -> None:
        """Write the reference, and how the networks of a collection were aligned to it (safetensors)."""
        parts = ((STATE, self.state), (PERMUTATION, changes.permutations), (SCALE, changes.scales))
        write_tensors(path, {f"{prefix}{name}": t for prefix, part in parts for name, t in part.items()})

    @classmethod
    def load(cls, path: Path, groups: Groups, *, balance: bool, seed: int) -> tuple[Reference, Changes]:
        """Read what `save` wrote.

        Raises:
            Damaged: it cannot be read.
        """
        found: dict[str, dict[str, Tensor]] = {STATE: {}, PERMUTATION: {}, SCALE: {}}
        for key, tensor in read_tensors(path).items():
            prefix, _, name = key.partition("/")
            found[f"{prefix}/"][name] = tensor
        return cls(found[STATE], groups, balance, seed), Changes(found[PERMUTATION], found[SCALE])
