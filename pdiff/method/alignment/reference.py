"""`Reference`: what the networks of a population are aligned to, the same for originals and generated networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pdiff.files import read_tensors, write_tensors
from pdiff.method.alignment import groups as units
from pdiff.method.alignment.groups import Groups, inverse, permute
from pdiff.method.alignment.matching import align
from pdiff.method.collection import Collection, StateDict

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
    def fit(cls, collection: Collection, groups: Groups, *, balance: bool, seed: int) -> Reference:
        """The mean of the networks of a collection once they are aligned to the first one.

        One assignment to the mean is more faithful than one to any network: the noise of single networks is averaged
        out (as in the merging of many models; Ainsworth et al. 2022, arXiv 2209.04836, section A.11).
        """
        first = cls(collection[0], groups, balance, seed)
        aligned, _ = first.align(collection)
        mean = {n: t.mean(0) if t.is_floating_point() else t[0] for n, t in aligned.tensors.items()}
        return cls(mean, groups, balance, seed)

    def align(self, collection: Collection) -> tuple[Collection, Changes]:
        """Networks with their units in the order of the reference; they compute what they did."""
        scales: dict[str, Tensor] = {}
        if self.balance:
            collection, scales = units.balance(collection, self.groups)
        aligned, permutations = align(collection, self.state, self.groups, seed=self.seed)
        return aligned, Changes(permutations, scales)

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
