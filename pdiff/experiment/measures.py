"""What the metrics of a group of networks are computed from: the group beside fitted and held-out originals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import nan

import torch
from torch import Tensor

from pdiff.experiment.metrics import TAUS
from pdiff.method.collection import Collection
from pdiff.method.novelty import (
    Products,
    Span,
    centered_products,
    data_copying,
    disagreement,
    frechet_distance,
    nearest_two,
    novel_and_performant,
    precision_recall_density_coverage,
)
from pdiff.method.similarity import maxima_without_self, wrong_iou
from pdiff.method.statistics import Replicates, hypervolume_interval, mean_replicates, median_replicates
from pdiff.method.vectors import Matrix, joined
from pdiff.networks.evaluators import Evaluation
from pdiff.seeds import stream

BAR = 0.1  # the quantile of the held-out networks' accuracy that a network must reach to be called performant
FRONT_SIZE = 6  # networks of which a hypervolume is taken: a quarter of the smallest groups, or the mean is too low
COMPONENTS = 32  # principal components of the Fréchet distance, at most: Gaussians of more need more networks


@dataclass(eq=False)
class Evaluated:
    """N networks of one group after their evaluation. What is expensive is computed once, and only if asked for.

    Attributes:
        name: of the group.
        networks: their weights.
        vectors: the same, standardised, float32 (N, D), a tensor or computed where they are read; of independent seeds,
            aligned.
        results: part of the images -> what was measured there.
        matched: distance of each network to a fitted one, with its units matched to that one's, (N,), as
            `Originals.distances` returns it; None where networks are not aligned.
        originals: the group of originals that generators and baselines are fitted on; None for that group itself.
        heldout: the group of held-out originals; None where there is none, and for that group itself.
        beside: all groups that are compared, by name; the inner products of all are taken in one pass.
    """

    name: str
    networks: Collection
    vectors: Matrix
    results: Mapping[str, Evaluation]
    matched: Tensor | None = None
    originals: Evaluated | None = None
    heldout: Evaluated | None = None
    beside: Mapping[str, Evaluated] = field(default_factory=dict)

    @property
    def fitted(self) -> Evaluated:
        """The group of originals that generators and baselines are fitted on."""
        return self.originals or self

    @property
    def reference(self) -> Evaluated | None:
        """The held-out originals; for themselves, they are their own reference."""
        return self.heldout or (self if self.name == "heldout" else None)

    @property
    def part(self) -> str | None:
        """The last part of the images on which predictions are known: test, where test images were used."""
        known = [part for part, result in self.results.items() if result.wrong is not None]
        return known[-1] if known else None

    # -- accuracy

    def accuracy(self, part: str) -> Tensor | None:
        """Accuracy of each network, (N,), on a part of the images; None where that part was not used."""
        return self.results[part].accuracy if part in self.results else None

    def nll(self, part: str) -> Tensor | None:
        """Mean negative log likelihood of each network, in nats, (N,); None where probabilities are unknown."""
        return self.results[part].nll if part in self.results else None

    def ece(self, part: str) -> Tensor | None:
        """Expected calibration error of each network, (N,); None where probabilities are unknown."""
        return self.results[part].ece if part in self.results else None

    def votes(self, part: str, what: str) -> dict[str, float]:
        """Suffix "_<m>" -> what soft votes of m networks reach on average: accuracy, nll or ece."""
        votes = self.results[part].votes if part in self.results else None
        return {f"_{m}": getattr(vote, what).mean().item() for m, vote in (votes or {}).items()}

    @property
    def last_part(self) -> str | None:
        """The part of the images that groups are compared on: test, where test images were used."""
        return next(reversed(self.results), None)

    @cached_property
    def mean_accuracy(self) -> Replicates:
        """Mean accuracy on the last part, and its bootstrap replicates, on the same images in all groups."""
        result = self.results[self.last_part]
        return mean_replicates(result.accuracy if result.wrong is None else ~result.wrong, seed=stream(0, self.name))

    @cached_property
    def median_novelty(self) -> Replicates:
        """Median novelty, and its bootstrap replicates; only where there are held-out networks."""
        return median_replicates(self.novelty(), seed=stream(0, self.name))

    # -- predictions

    @cached_property
    def similarities(self) -> Tensor | None:
        """IoU of errors with those of every fitted network, (N, fitted); None where predictions are unknown."""
        if self.part is None:
            return None
        return wrong_iou(self.results[self.part].wrong, self.fitted.results[self.part].wrong)

    def max_similarity(self) -> Tensor | None:
        """Largest similarity of each network to a fitted one, (N,); of a fitted one, to another one."""
        if self.similarities is None:
            return None
        return maxima_without_self(self.similarities) if self.originals is None else self.similarities.amax(dim=1)

    @cached_property
    def nearest_disagreement(self) -> Tensor | None:
        """Smallest share of images on which each network and a fitted one predict different classes, (N,)."""
        if self.part is None or self.results[self.part].predicted is None:
            return None
        shares = disagreement(self.results[self.part].predicted, self.fitted.results[self.part].predicted)
        return nearest_two(shares, same=self.originals is None)[0]

    def disagreement(self) -> Tensor | None:
        """`nearest_disagreement` over its median among held-out networks, (N,): novelty of the function."""
        theirs = self.reference and self.reference.nearest_disagreement
        if theirs is None or self.nearest_disagreement is None or not theirs.quantile(0.5) > 0:
            return None
        return self.nearest_disagreement / theirs.quantile(0.5)

    # -- weights

    @cached_property
    def products(self) -> Products:
        """Inner products with the fitted networks, from which most measures come.

        Whichever group asks first gets them for all beside it: one pass over the numbers of the fitted ones.
        """
        groups = [group for group in self.beside.values() if "products" not in vars(group)] or [self]
        inner, norms, *rest = centered_products(joined([group.vectors for group in groups]), self.fitted.vectors)
        sizes = [len(group.vectors) for group in groups]
        for group, *own in zip(groups, inner.split(sizes), norms.split(sizes), strict=True):
            vars(group)["products"] = Products(*own, *rest)
        return vars(self)["products"]

    @cached_property
    def within(self) -> Products:
        """Inner products of the group with itself, about its own mean."""
        return self.products if self.originals is None else centered_products(self.vectors, self.vectors)

    @cached_property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """Distance of each network to the nearest and to the second nearest fitted one, (N,) each.

        Root mean squares over the parameters, in standard deviations of the weights. Where another order of the units
        brings a network to less than half the distance, it is as near as it is in that order. Smaller gains do not
        count: matched directly, independent networks come a few percent nearer, too.
        """
        squares = self.products.squared_distances() / self.vectors.shape[1]
        first, second = nearest_two(squares.sqrt(), same=self.originals is None)
        if self.matched is not None:
            first = torch.where(self.matched < first / 2, self.matched.to(first), first)
        return first, second

    def novelty(self) -> Tensor | None:
        """Distance to the nearest fitted network over the median of the held-out networks' distances, (N,)."""
        reference = self.reference and self.reference.nearest[0].quantile(0.5)
        return self.nearest[0] / reference if reference is not None and reference > 0 else None

    def nearest_ratio(self) -> Tensor:
        """Distance to the nearest fitted network over that to the second nearest, (N,): near 0 for a copy."""
        return self.nearest[0] / self.nearest[1]

    def z_u(self) -> float:
        """Data-copying test in weights; see `data_copying`."""
        return data_copying(self.nearest[0], self.reference.nearest[0]) if self._comparable else nan

    def z_u_predictions(self) -> float:
        """Data-copying test in predictions; see `data_copying`."""
        reference = self._comparable and self.reference.nearest_disagreement
        if reference is None or reference is False or self.nearest_disagreement is None:
            return nan
        return data_copying(self.nearest_disagreement, reference)

    @property
    def _comparable(self) -> bool:
        return None not in (self.originals, self.heldout) and len(self.vectors) > 1

    @cached_property
    def span(self) -> Span:
        """The principal axes of the fitted networks."""
        return Span.fit(self.vectors, self.products) if self.originals is None else self.originals.span

    @cached_property
    def projected(self) -> tuple[Tensor, Tensor]:
        """Coordinates on the principal axes of the fitted ones, float64 (N, L), and shares outside of their span."""
        return self.span.project(self.vectors, self.products)

    @property
    def coordinates(self) -> Tensor:
        """Latents: coordinates on all principal axes of the fitted networks, float64 (N, L)."""
        return self.projected[0]

    def outside_span(self) -> Tensor:
        """Share of the squared distance from the mean that lies outside the affine span of the fitted, (N,)."""
        return self.projected[1]

    def dispersion(self) -> float:
        """Standard deviation over that of the fitted networks: near 0 if all networks of the group are alike.

        In the whole space: held-out networks of independent seeds lie mostly outside of the span of the fitted ones.
        """
        if len(self.vectors) < 2 or len(self.fitted.vectors) < 2:
            return nan
        ours, theirs = (x.total_variance for x in (self, self.fitted))
        return (ours / theirs) ** 0.5 if theirs > 0 else nan

    @cached_property
    def total_variance(self) -> float:
        """The sum of the variances of all parameters."""
        return self.within.b.sum().item() / (len(self.vectors) - 1)

    def frechet(self) -> float:
        """Fréchet distance to the fitted networks on their first principal axes: a diagnostic, not a score."""
        if len(self.vectors) < 2 or len(self.fitted.vectors) < 2:
            return nan
        return frechet_distance(self.coordinates[:, :COMPONENTS], self.fitted.coordinates[:, :COMPONENTS])

    @cached_property
    def prdc(self) -> dict[str, float]:
        """Precision, recall, density and coverage with regard to the fitted networks; see the function of that name."""
        if self.originals is None or len(self.vectors) < 2:
            return {}
        return precision_recall_density_coverage(
            self.fitted.products.squared_distances(),
            self.products.squared_distances(),
            self.within.squared_distances(),
        )

    # -- both

    def novel_and_performant(self, part: str) -> dict[str, float]:
        """Suffix "_<tau>" -> share of networks that are as accurate as held-out ones, and at least tau times as new.

        As accurate: not below the 10th percentile of the held-out networks' accuracy.
        """
        accuracy, novelty = self.accuracy(part), self.novelty()
        if accuracy is None or novelty is None:
            return {}
        bar = torch.quantile(self.reference.accuracy(part), BAR).item()
        return {f"_{tau:g}": novel_and_performant(accuracy, novelty, bar=bar, tau=tau) for tau in TAUS}

    def points(self, part: str) -> Tensor | None:
        """Novelty, at most 1, and accuracy of each network, (N, 2): what a front is made of.

        Beyond the distance of held-out networks, more distance is no more novelty.
        """
        accuracy, novelty = self.accuracy(part), self.novelty()
        if accuracy is None or novelty is None:
            return None
        return torch.stack([novelty.clamp(max=1), accuracy], dim=1)

    def hypervolume(self, part: str) -> dict[str, float]:
        """Area that FRONT_SIZE networks of the group dominate in the square of novelty and accuracy, from (0, 0) on.

        With its 95 % interval ("_low", "_high"). The size is fixed, since more networks dominate more.
        """
        points = self.points(part)
        if points is None or len(points) < 2:
            return {}
        found = hypervolume_interval(points, torch.zeros(2), size=FRONT_SIZE, seed=0)
        return dict(zip(("", "_low", "_high"), found, strict=True))
