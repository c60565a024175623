"""From predictions to metrics: a row for each network, similarities between networks, and a summary of groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from pdiff.experiment.metrics import PAIRS, STATISTICS, by_part, of_networks
from pdiff.method.collection import Collection
from pdiff.method.novelty import nearest_two, squared_distances
from pdiff.method.similarity import maxima_without_self, mean_between, wrong_iou
from pdiff.method.standardize import Standardizer
from pdiff.networks.evaluators import Evaluation, Evaluations


@dataclass(frozen=True)
class Evaluated:
    """N networks of one group after their evaluation: what the metrics of each network are computed from.

    Attributes:
        name: of the group.
        networks: its weights.
        results: part of the images -> accuracies, and error masks where they are known.
        similarity: IoU of errors with those of every original, (N, originals), on the last part with error masks.
        nearest_distance: to the nearest original, (N,), in standard deviations of the weights.
    """

    name: str
    networks: Collection
    results: Mapping[str, Evaluation]
    similarity: Tensor | None
    nearest_distance: Tensor

    def accuracy(self, part: str) -> Tensor | None:
        """Accuracy of each network, (N,), on a part of the images; None where that part was not used."""
        return self.results[part].accuracy if part in self.results else None

    def max_similarity(self) -> Tensor | None:
        """Largest similarity of each network to an original, (N,); of an original, to another one."""
        if self.similarity is None:
            return None
        return maxima_without_self(self.similarity) if self.name == "original" else self.similarity.amax(dim=1)


def compare_networks(
    groups: Mapping[str, Collection], results: Evaluations, standardizer: Standardizer
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Measure every network, and the similarity of originals and generated networks.

    Args:
        groups: name -> networks, `original` and `generated` among them.
        results: part of the images -> group -> accuracies, and error masks where they are known.
        standardizer: of the originals; distances are in its units.

    Returns:
        One row a network: group, index, and each metric of networks that could be measured; and, for every part with
        error masks, the IoU of errors of the originals followed by the generated networks, (n, n).
    """
    similarity = {}  # part -> group -> IoU of errors, (N, originals + generated)
    for part, of in results.items():
        if of["original"].wrong is not None:
            paired = torch.cat([of[name].wrong for name in ("original", "generated")])
            iou = wrong_iou(torch.cat([of[name].wrong for name in groups]), paired)
            similarity[part] = dict(zip(groups, iou.split([len(group) for group in groups.values()]), strict=True))
    last, count = next(reversed(similarity.values()), {}), len(groups["original"])
    originals, frames = standardizer.encode(groups["original"]), []
    for name, networks in groups.items():
        vectors = originals if name == "original" else standardizer.encode(networks)
        nearest, _ = nearest_two(squared_distances(vectors, originals), same=name == "original")
        group = Evaluated(
            name=name,
            networks=networks,
            results={part: of[name] for part, of in results.items()},
            similarity=last[name][:, :count] if last else None,
            nearest_distance=(nearest / originals.shape[1]).sqrt().float(),
        )
        values = {metric: entry.measure(group) for metric, entry in of_networks().items()}
        columns = {metric: value.numpy() for metric, value in values.items() if value is not None}
        frames.append(pd.DataFrame({"group": name, "index": range(len(networks)), **columns}))
    matrices = {part: torch.cat([of["original"], of["generated"]]) for part, of in similarity.items()}
    return pd.concat(frames, ignore_index=True), matrices


def summary(evaluation: pd.DataFrame, matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of a run: statistics over the networks of every group, and the similarities (paper, section 5).

    Args:
        evaluation, matrices: what `compare_networks` returns.
    """
    metrics = {}
    for group, rows in evaluation.groupby("group", sort=False):
        for name, metric in of_networks().items():
            if name in rows:
                statistics = {statistic: float(STATISTICS[statistic](rows[name])) for statistic in metric.statistics}
                metrics |= {f"{name}/{group}_{statistic}": value for statistic, value in statistics.items()}
    count = int((evaluation["group"] == "original").sum())
    for part, matrix in matrices.items():
        between = matrix[count:, :count]  # generated, originals
        means = (
            mean_between(matrix[:count, :count]),
            mean_between(matrix[count:, count:]),
            between.mean().item(),
            between.amax(dim=1).mean().item(),
        )
        metrics |= {f"{by_part('similarity')[part]}/{pair}": mean for pair, mean in zip(PAIRS, means, strict=True)}
    return metrics
