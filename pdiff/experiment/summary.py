"""What is made of judged networks: a row for each, similarities of originals and generated ones, and a summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from pdiff.method.collection import Collection
from pdiff.method.similarity import maxima_without_self, mean_between, nearest_distance, wrong_iou
from pdiff.method.standardize import Standardizer
from pdiff.networks.evaluators import Evaluation, Evaluations

COLUMNS = {"validation": "val_accuracy", "test": "test_accuracy"}
SIMILARITIES = {"validation": "val_similarity", "test": "similarity"}
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
    "std": partial(torch.std, correction=0),
    "median": partial(torch.quantile, q=0.5),
}


def evaluation_table(
    groups: Mapping[str, Collection], verdicts: Evaluations, standardizer: Standardizer
) -> pd.DataFrame:
    """One row a network: group, index, accuracies, largest similarity to an original, distance to the nearest one.

    Args:
        groups: name -> networks, `original` among them.
        verdicts: part -> group -> verdict. Similarity is that on the last part that has predictions.
        standardizer: of the originals; distances are in its units.
    """
    originals = standardizer.encode(groups["original"])
    predicted = next((v for v in reversed(verdicts.values()) if v["original"].wrong is not None), None)
    frames = []
    for name, group in groups.items():
        columns = {COLUMNS[part]: verdict[name].accuracy for part, verdict in verdicts.items()}
        if predicted:
            columns["max_similarity"] = _nearest_similarity(predicted, name)
        distance = nearest_distance(standardizer.encode(group), originals, same=name == "original")
        frames.append(
            pd.DataFrame({"group": name, "index": range(len(group)), **columns, "nearest_distance": distance})
        )
    return pd.concat(frames, ignore_index=True)


def _nearest_similarity(verdicts: Mapping[str, Evaluation], name: str) -> Tensor:
    """Each network's largest similarity to an original, to another one for the originals themselves."""
    similarity = wrong_iou(verdicts[name].wrong, verdicts["original"].wrong)
    return maxima_without_self(similarity) if name == "original" else similarity.amax(dim=1)


def similarity_matrices(verdicts: Evaluations) -> dict[str, Tensor]:
    """Part -> similarity of originals and generated networks, (n, n), of every part that has predictions."""
    matrices = {}
    for part, verdict in verdicts.items():
        if verdict["original"].wrong is not None:
            both = torch.cat([verdict["original"].wrong, verdict["generated"].wrong])
            matrices[part] = wrong_iou(both, both)
    return matrices


def summary(evaluation: pd.DataFrame, matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics: accuracy statistics and mean distance of every group, and the four similarities (method, section 5)."""
    metrics = {}
    for name, rows in evaluation.groupby("group", sort=False):
        for column in (column for column in COLUMNS.values() if column in rows):
            values = torch.tensor(rows[column].to_numpy())
            metrics |= {f"{column}/{name}_{stat}": float(of(values)) for stat, of in STATISTICS.items()}
        metrics[f"nearest_distance/{name}_mean"] = float(rows["nearest_distance"].mean())
    originals = int((evaluation["group"] == "original").sum())
    for part, matrix in matrices.items():
        between = matrix[originals:, :originals]
        values = {
            "original_original": mean_between(matrix[:originals, :originals]),
            "generated_generated": mean_between(matrix[originals:, originals:]),
            "original_generated": between.mean().item(),
            "original_generated_max": between.amax(dim=1).mean().item(),
        }
        metrics |= {f"{SIMILARITIES[part]}/{name}": value for name, value in values.items()}
    return metrics
