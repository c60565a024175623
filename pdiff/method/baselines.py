"""Baselines: the null arms, networks that need no generator. BASELINES lists them; `noise` makes one of a given scale.

Importing this module imports no torch; how each baseline is computed stands in `null_arms`. All work on standardised
vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pdiff.method.options import resolve
from pdiff.seeds import stream

if TYPE_CHECKING:
    from torch import Tensor

    from pdiff.method import collection
    from pdiff.method.standardize import Standardizer
    from pdiff.method.vectors import Matrix

PARTS = {
    "reconstruct": "an autoencoder",
    "distance": "generated networks, to whose distance it is matched",
    "recombine": "the permutation groups of the network",
}
"""Optional parts of `Fitted`, and what each of them is."""


@dataclass(frozen=True)
class Fitted:
    """What baselines are made of.

    Attributes:
        vectors: standardised vectors of the fitted originals, float32 (N, D), on the CPU, in the order of collection;
            a tensor, or computed where they are read.
        standardizer: checkpoints <-> vectors.
        reconstruct: vectors (n, D) through the fitted autoencoder and back, (n, D).
        distance: median distance of the generated networks to the nearest original (root mean square over parameters,
            in standard deviations of the weights, as of `similarity.nearest_distance`).
        recombine: parents (M, k), rows of `vectors`, and a seed -> vectors (M, D), each unit from one of its parents.

    Raises:
        ValueError: the distance is negative, infinite or NaN.
    """

    vectors: Matrix
    standardizer: Standardizer
    reconstruct: Callable[[Matrix], Matrix] | None = None
    distance: float | None = None
    recombine: Callable[[Tensor, int], Matrix] | None = None

    def __post_init__(self) -> None:
        if self.distance is not None and not 0 <= self.distance < math.inf:
            raise ValueError(f"0 <= distance < inf must hold, but got {self.distance}")

    @property
    def parts(self) -> frozenset[str]:
        """Names of the optional parts that are there."""
        return frozenset(name for name in PARTS if getattr(self, name) is not None)


@dataclass(frozen=True)
class Baseline:
    """Networks that need no generator.

    Attributes:
        name: of the group of networks.
        function: (fitted, count, seed, **options) -> vectors (M, D), or its name as "module:function".
        description: what they are, for a reader, with the source.
        originals: how many originals it needs.
        parts: which parts of PARTS it needs.
        options: further arguments of the function.
    """

    name: str
    function: Any
    description: str
    originals: int = 1
    parts: tuple[str, ...] = ()
    options: Mapping[str, float] = field(default_factory=dict)

    def unmet(self, originals: int, parts: Collection[str] = ()) -> str:
        """Why it cannot be made of so many originals and of these parts; empty where it can."""
        if originals < self.originals:
            return f"baseline {self.name} needs {self.originals} originals, but there are {originals}"
        missing = [PARTS[part] for part in self.parts if part not in parts]
        return f"baseline {self.name} needs {', '.join(missing)}" if missing else ""

    def make(self, fitted: Fitted, count: int, seed: int) -> Matrix:
        """Standardised vectors of its networks, float32 (M, D), on the CPU.

        M is `count`, or less where there are no more different ones. The random stream is its own, by its name.
        Network k does not depend on `count`.

        Args:
            fitted: what it is made of.
            count: networks, at most.
            seed: of the experiment.

        Raises:
            ValueError: `count` < 1, or something that it needs is missing.
        """
        if count < 1:
            raise ValueError(f"count >= 1 must hold, but got {count}")
        if reason := self.unmet(len(fitted.vectors), fitted.parts):
            raise ValueError(reason)
        return resolve(self.function)(fitted, count, stream(seed, self.name), **self.options)

    def __call__(
        self, originals: collection.Collection, *, count: int | None = None, seed: int = 0
    ) -> collection.Collection:
        """Its networks, made of a collection alone; at most `count`, as many as there are originals when absent.

        Raises:
            ValueError: as `make`.
        """
        from pdiff.method.standardize import Standardizer

        standardizer = Standardizer.fit(originals)
        fitted = Fitted(standardizer.vectors(originals), standardizer)
        return standardizer.decode(self.make(fitted, len(originals) if count is None else count, seed))


def noise(scale: float) -> Baseline:
    """The baseline `noise_<scale>`: originals whose standardised tensors get N(0, scale^2) (method, section 5)."""
    description = f"Originals with Gaussian noise of {scale:g} standard deviations of the weights (arXiv 2402.13144)."
    return Baseline(f"noise_{scale:g}", "pdiff.method.null_arms:noise", description, options={"scale": scale})


def available(originals: int, parts: Collection[str] = ()) -> list[str]:
    """Names of the baselines that can be made of so many originals and of these parts."""
    return [name for name, baseline in BASELINES.items() if not baseline.unmet(originals, parts)]


def _average(size: int) -> Baseline:
    description = f"Means of {size} originals drawn at random (as in arXiv 2506.07998)."
    function = "pdiff.method.null_arms:average_of"
    return Baseline(f"average_{size}", function, description, originals=size, options={"size": size})


def _recombined(size: int) -> Baseline:
    return Baseline(
        f"recombined_{size}",
        "pdiff.method.null_arms:recombined",
        f"Every neuron is that of one of {size} originals, drawn at random, in its place.",
        originals=size,
        parts=("recombine",),
        options={"size": size},
    )


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            "average",
            "pdiff.method.null_arms:average",
            "One network, the mean of all originals (the ensemble of arXiv 2402.13144).",
        ),
        _average(4),
        _average(16),
        Baseline(
            "midpoint",
            "pdiff.method.null_arms:average_of",
            "Halfway between two originals drawn at random (as in linear mode connectivity, arXiv 1912.05671).",
            originals=2,
            options={"size": 2},
        ),
        Baseline(
            "convex",
            "pdiff.method.null_arms:convex",
            "Means of all originals with random weights, uniform on the simplex (a flat Dirichlet distribution).",
            originals=2,
        ),
        Baseline(
            "gaussian_diagonal",
            "pdiff.method.null_arms:gaussian_diagonal",
            "Samples of a Gaussian with the originals' mean and variance of each parameter (as in arXiv 2506.07998).",
            originals=2,
        ),
        Baseline(
            "gaussian",
            "pdiff.method.null_arms:gaussian",
            "Samples of a Gaussian with the originals' mean and full sample covariance.",
            originals=2,
        ),
        Baseline(
            "swag",
            "pdiff.method.null_arms:swag",
            "Samples of SWAG, a Gaussian of the iterates of training: half its covariance is that of each parameter, "
            "half that of the last 20 deviations from the running mean (Maddox et al. 2019, arXiv 1902.02476).",
            originals=2,
            options={"rank": 20},
        ),
        Baseline(
            "kde",
            "pdiff.method.null_arms:kde",
            "Samples of a kernel density estimate of the originals on principal components, with Gaussian kernels of "
            "Scott's bandwidth (Scott 1992).",
            originals=2,
            options={"variance": 0.999},
        ),
        Baseline(
            "mixed",
            "pdiff.method.null_arms:mixed",
            "Originals moved towards samples of their Gaussian, so that mean and covariance stay.",
            originals=2,
            options={"a": 0.5},
        ),
        _recombined(2),
        _recombined(4),
        _recombined(32),
        Baseline(
            "reconstruction",
            "pdiff.method.null_arms:reconstruction",
            "Originals through the fitted autoencoder and back, without diffusion.",
            parts=("reconstruct",),
        ),
        Baseline(
            "noise_matched",
            "pdiff.method.null_arms:noise_matched",
            "Originals with Gaussian noise that takes them as far from the originals as generated networks are.",
            parts=("distance",),
        ),
    )
}
"""Name of the group -> its baseline."""
