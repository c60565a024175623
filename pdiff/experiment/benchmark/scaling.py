"""How seconds grow with D, numbers of a network, and with N, networks: measured, with the fitted exponents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from pdiff.experiment.benchmark import Sizes, parts
from pdiff.experiment.benchmark.measure import seconds_of
from pdiff.method.alignment.matching import align
from pdiff.method.alignment.symmetries import permutation_groups
from pdiff.method.autoencoders.pca import PCA
from pdiff.method.novelty import squared_distances

FITTED = 3  # of the largest sizes: below, fixed costs flatten the curve


class Point(NamedTuple):
    """Seconds of an operation at one size.

    Attributes:
        operation: a name of SCALED.
        over: what grows, D or N.
        size: numbers of a network, D.
        networks: N.
        seconds: the median of the repeats.
    """

    operation: str
    over: str
    size: int
    networks: int
    seconds: float


def _pca(count: int, size: int, device: torch.device) -> Callable[[], object]:
    x = parts.vectors(count, size, device)
    return lambda: PCA.fit(x, latent_size=min(64, count - 1))


def _alignment(count: int, size: int, device: torch.device) -> Callable[[], object]:
    inputs = (size - parts.numbers(0)) // parts.HIDDEN
    networks = parts.population(count, inputs)
    groups = permutation_groups(parts.network(inputs), torch.zeros(2, inputs))
    return lambda: align(networks, networks[0], groups)


def _distances(count: int, size: int, device: torch.device) -> Callable[[], object]:
    x = parts.vectors(count, size, device)
    return lambda: squared_distances(x, x)


SCALED: dict[str, Callable[[int, int, torch.device], Callable[[], object]]] = {
    "pca": _pca,
    "alignment": _alignment,
    "distances": _distances,
}
"""Operation -> prepares it for (N, D, device)."""


def measure(sizes: Sizes, device: torch.device) -> Iterator[Point]:
    """Time every operation over D at a few networks, and over N at the smallest D."""
    over = [("D", sizes.few, size) for size in sizes.scaled_size]
    over += [("N", count, sizes.scaled_size[0]) for count in sizes.scaled_count]
    cases = [(name, *case) for name in SCALED for case in over]
    for name, axis, count, size in tqdm(cases, desc="scaling", unit="point", disable=None):
        call = SCALED[name](count, size, device)
        call()
        times = [seconds_of(call, device) for _ in range(sizes.repeats)]
        yield Point(name, axis, size, count, float(np.median(times)))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The power with which seconds grow: the slope of the least-squares line through their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def exponents(points: Iterable[Point]) -> dict[tuple[str, str], float]:
    """(operation, D or N) -> the exponent over the largest sizes."""
    rows: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for point in points:
        size = point.size if point.over == "D" else point.networks
        rows.setdefault((point.operation, point.over), []).append((size, point.seconds))
    return {key: exponent(*zip(*sorted(found)[-FITTED:], strict=True)) for key, found in rows.items()}
