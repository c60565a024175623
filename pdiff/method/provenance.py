"""Which networks of a collection come from one initialisation, and which from one training, as their weights show."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from xxhash import xxh3_128

from pdiff.method.collection import Collection, is_generated

SKETCH = 2048  # numbers that stand for a network: cosines are then accurate to 1 / sqrt(SKETCH) = 0.02
BLOCK = 1 << 22  # numbers that are read at a time
PAIRS = 4096  # pairs of networks that a median is taken over
WINDOW = 1024  # networks before one among which the nearest is looked for
ORDERS = 19  # random orders that the order of the networks is compared with: none may be as good, a test at 5 %

# Thresholds lie between what was measured on small MLPs and CNNs, of digits: cosines of the matrices of one training,
# or of branches of one trunk, 0.83 or more between neighbours; of independent seeds at most 0.25, and 0.63 once their
# units are aligned. Cosines of differences from the mean, where 30 networks are branches: up to 0.4 for most of them.
SAME_ORIGIN = 0.75  # cosine of the matrices from which on two networks come from one initialisation
ALIGNED = 0.3  # their median cosine from which on independent networks may as well be branches that went far
SAME_RUN = 0.5  # cosine of differences from the mean from which on two networks come from one training
ORTHOGONAL, DIRECTIONS = 0.3, 5  # median cosine of trainings that are independent, and how many must be so
STEPS = 0.75  # `order` up to which networks follow each other as steps


@dataclass(frozen=True)
class Provenance:
    """What the weights of N networks say of where they come from.

    Attributes:
        kind: of population: `trajectory`, `seeds` or `branches`; `files` where it is not clear.
        possible: the kinds that are not excluded.
        runs: number of the training that each network comes from, from 0, as far as it shows.
        digests: of the numbers of each network that can be generated; equal for equal ones.
        equal: index of the first network that is equal to each.
        origins: from how many initialisations they come, as far as it shows.
        cosine: median over pairs of the cosine of their matrices and kernels, those that vary; NaN where none does.
            Networks from independent initialisations are nearly orthogonal, those from one are not.
        order: mean squared distance of networks that follow one another over that of any two, both of one origin: half
            of von Neumann's ratio (1941). 1 where the order means nothing, 3 / N on a random walk; NaN where there are
            no three networks of one origin.
    """

    kind: str
    possible: tuple[str, ...]
    runs: list[int]
    digests: list[str]
    equal: list[int]
    origins: int
    cosine: float
    order: float

    @classmethod
    def of(cls, collection: Collection) -> Provenance:
        """Measure a collection of at least two different networks, in the order of the steps if they are steps.

        Equal networks count once. Networks whose matrices are alike come from one initialisation, as do those that are
        connected by such pairs. Where there are several, each is a separate training; where there is one, see
        `_of_one_origin`.
        """
        digests = [digest(collection, row) for row in range(len(collection))]
        first: dict[str, int] = {}
        equal = [first.setdefault(text, row) for row, text in enumerate(digests)]
        distinct = torch.tensor(list(first.values()))
        matrices, everything = (rows[distinct] for rows in sketches(collection))
        origin, cosine = torch.zeros(len(distinct), dtype=torch.long), nan
        if matrices.any():
            directions = F.normalize(matrices)
            origin, cosine = connected(directions, SAME_ORIGIN), _median_cosine(directions)
        origins, (order, ordered) = int(origin.max()) + 1, _order(everything, origin)
        if origins > 1:
            kind, run = "seeds", origin
            possible = {"seeds", "branches"} if origins == len(distinct) and cosine > ALIGNED else {"seeds"}
        else:
            kind, possible, run = _of_one_origin(everything, ordered and order <= STEPS)
            if not isfinite(cosine) and kind != "trajectory":  # seeds would look alike
                kind, possible = "files", possible | {"seeds"}
        runs = run[torch.searchsorted(distinct, torch.tensor(equal))].tolist()
        return cls(kind, tuple(sorted(possible)), runs, digests, equal, origins, cosine, order)

    def figures(self) -> dict[str, Any]:
        """What was measured of all networks together, as plain data; None for NaN."""
        numbers = {name: getattr(self, name) for name in ("cosine", "order")}
        rounded = {name: round(value, 4) if isfinite(value) else None for name, value in numbers.items()}
        counts = {"different": len(set(self.equal)), "origins": self.origins, "runs": len(set(self.runs))}
        return {"kind": self.kind, "possible": list(self.possible)} | counts | rounded

    def describe(self) -> str:
        """One line for people."""
        start = "one initialisation" if self.origins == 1 else f"{self.origins} initialisations"
        text = f"{len(set(self.equal))} different networks of {start}, {len(set(self.runs))} of independent training"
        if isfinite(self.cosine):
            text += f"; median cosine of their matrices {self.cosine:.2f}"
        if isfinite(self.order):
            text += (
                f"; mean squared distance of those that follow one another {self.order:.2f} of that of any two of one "
                "initialisation (1 if their order means nothing)"
            )
        return text


def _of_one_origin(vectors: Tensor, in_order: bool) -> tuple[str, set[str], Tensor]:
    """Kind of population, kinds that are not excluded, and the training of each of some networks of one initialisation.

    Branches leave the trunk in orthogonal directions, while steps of one training share few, on both sides of their
    mean. Branches whose first steps have much in common do not show so; but each begins near to where others did, and
    far from the end of the one before.
    """
    centred = vectors - vectors.mean(dim=0)
    run = connected(F.normalize(centred), SAME_RUN, opposite=True)
    means = torch.stack([centred[run == k].mean(dim=0) for k in range(int(run.max()) + 1)])
    if len(means) >= DIRECTIONS and _median_cosine(F.normalize(means), absolute=True) <= ORTHOGONAL:
        # Steps that are so far apart that a training forgets the one before look alike.
        return "branches", {"branches"} if in_order else {"branches", "trajectory"}, run
    run, follows = _beginnings(centred)
    if follows and int(run.max()):
        return "branches", {"branches"}, run
    if follows and in_order:
        return "trajectory", {"trajectory"}, run
    return "files", {"branches", "trajectory"}, torch.arange(len(vectors))


def _beginnings(vectors: Tensor) -> tuple[Tensor, bool]:
    """The run of each network where every run begins near to an earlier network and far from the one before.

    Returns:
        The number of the run, from 0; and whether networks follow one another in the runs, as steps do.
    """
    exact, begins, follows = vectors.double(), [torch.tensor([False])], [torch.tensor([True])]
    for rows in torch.arange(1, len(exact)).split(256):
        earlier = torch.arange(max(0, int(rows[0]) - WINDOW), int(rows[-1]))
        distances = torch.cdist(exact[rows], exact[earlier], compute_mode="use_mm_for_euclid_dist")
        nearest, place = distances.where(earlier < rows[:, None], torch.inf).min(dim=1)
        before, lag = (exact[rows] - exact[rows - 1]).norm(dim=1), rows - earlier[place]
        begins.append((lag > 2) & (nearest.square() < before.square() / 2))
        follows.append(lag <= 2)
    first, close = torch.cat(begins), torch.cat(follows)
    long_enough = len(exact) >= 3 * (int(first.sum()) + 1)
    return first.cumsum(0), long_enough and bool(close[~first].float().mean() > 0.5)


def digest(collection: Collection, row: int) -> str:
    """A digest of the numbers of a network that can be generated."""
    found = xxh3_128()
    for name, tensor in collection[row].items():
        if is_generated(name, tensor):
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def sketches(collection: Collection) -> tuple[Tensor, Tensor]:
    """Sketches of the networks, float32 (N, SKETCH): of their matrices and kernels, and of all tensors; that vary.

    A count sketch (Charikar, Chen and Farach-Colton, 2002): numbers get random signs and are summed in SKETCH buckets,
    which preserves inner products; of up to SKETCH numbers exactly. Each tensor counts in units of its root mean
    square, so that none dominates.
    """
    matrices, others = torch.zeros(2, len(collection), SKETCH)
    generator, offset = torch.Generator().manual_seed(0), 0
    chosen = [rows for name, rows in collection.tensors.items() if is_generated(name, rows[0])]
    for rows in tqdm(chosen, "measure", unit="tensor", leave=False, disable=None):
        total, flat = torch.zeros(len(rows), SKETCH), rows.flatten(1)
        for start in range(0, flat.shape[1], BLOCK // 64):
            width = min(BLOCK // 64, flat.shape[1] - start)
            signs = torch.randint(2, (width,), generator=generator, dtype=torch.int8) * 2 - 1
            padding = (shift := (offset + start) % SKETCH, -(shift + width) % SKETCH)
            for some in torch.arange(len(rows)).split(max(1, BLOCK // width)):
                part = flat[some[0] : some[-1] + 1, start : start + width].float() * signs
                total[some] += F.pad(part, padding).unflatten(1, (-1, SKETCH)).sum(dim=1)
        offset += flat.shape[1]
        scale = (total.square().sum() / flat.numel()).sqrt()
        if (total - total[0]).abs().max() > 1e-6 * scale:  # it varies
            (matrices if rows.ndim > 2 else others).add_(total / scale)
    return matrices, matrices + others


def connected(directions: Tensor, cosine: float, *, opposite: bool = False) -> Tensor:
    """The connected component of each network, int64 (N,), where those of at least some cosine are connected.

    Args:
        directions: (N, K), of length 1.
        cosine: the least.
        opposite: whether the sign of the cosine does not matter.
    """
    label = torch.arange(len(directions))
    for rows in torch.arange(len(directions)).split(1024):
        cosines = directions[rows] @ directions[: rows[-1] + 1].T
        for row, near in zip(rows.tolist(), (cosines.abs() if opposite else cosines) >= cosine, strict=True):
            joined = label[: row + 1][near[: row + 1]].unique()
            if len(joined) > 1:
                label[torch.isin(label, joined)] = joined[0]
    return label.unique(return_inverse=True)[1]


def _median_cosine(directions: Tensor, *, absolute: bool = False) -> float:
    """The median cosine of PAIRS random pairs of directions (N, K)."""
    generator, count = torch.Generator().manual_seed(0), len(directions)
    left = torch.randint(count, (PAIRS,), generator=generator)
    right = (left + torch.randint(1, count, (PAIRS,), generator=generator)) % count
    found = (directions[left] * directions[right]).sum(dim=1)
    return (found.abs() if absolute else found).median().item()


def _order(vectors: Tensor, origin: Tensor) -> tuple[float, bool]:
    """`Provenance.order` of networks of some origins, and whether it is better than in all of ORDERS random orders."""
    generator = torch.Generator().manual_seed(0)
    groups = [rows for k in range(int(origin.max()) + 1) if len(rows := (origin == k).nonzero()[:, 0]) > 2]
    if not groups:
        return nan, False

    def squares(orders: list[Tensor]) -> float:
        return sum((vectors[rows[1:]] - vectors[rows[:-1]]).square().sum().item() for rows in orders)

    found, spread = squares(groups), sum((len(rows) - 1) * vectors[rows].var(dim=0).sum().item() for rows in groups)
    others = ([rows[torch.randperm(len(rows), generator=generator)] for rows in groups] for _ in range(ORDERS))
    return found / (2 * spread), all(squares(orders) > found * (1 + 1e-6) for orders in others)
