"""From evaluations to numbers: a row for each network, the metrics of a run, and the tables of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from pdiff.experiment.measures import Evaluated
from pdiff.experiment.metrics import METRICS, STATISTICS, by_part, of_networks
from pdiff.method.collection import Collection, is_generated
from pdiff.method.novelty import dispersion
from pdiff.method.similarity import mean_between, wrong_iou
from pdiff.method.standardize import Standardizer
from pdiff.networks.evaluators import Evaluations

GENERATED = ("generated",)
"""Groups that come from a generator, unless an audit says others; all but them and the originals are baselines."""
ORIGINALS = ("original", "heldout")


def evaluated(
    groups: Mapping[str, Collection],
    results: Evaluations,
    standardizer: Standardizer,
    matched: Mapping[str, Tensor] | None = None,
) -> dict[str, Evaluated]:
    """Groups of networks after their evaluation.

    Args:
        groups: name -> networks: `original`, which generators were fitted on; `heldout`, if there are held-out
            originals; and those that are compared with them.
        results: part of the images -> group -> what was measured.
        standardizer: of the originals; distances are in its units.
        matched: group -> what `Originals.distances` returns, where networks are aligned.
    """

    def group(name: str, **beside: Evaluated | None) -> Evaluated:
        of = {part: found[name] for part, found in results.items()}
        return Evaluated(
            name, groups[name], standardizer.vectors(groups[name], among=count), of, (matched or {}).get(name), **beside
        )

    count = sum(map(len, groups.values()))
    original = group("original")
    original.heldout = heldout = group("heldout", originals=original) if "heldout" in groups else None
    found = {"original": original} | ({"heldout": heldout} if heldout else {})
    others = [name for name in groups if name not in found]
    found |= {name: group(name, originals=original, heldout=heldout) for name in others}
    for evaluated_group in found.values():
        evaluated_group.beside = found
    return found


def evaluation_table(groups: Mapping[str, Evaluated]) -> pd.DataFrame:
    """One row a network: group, index, and each metric of networks that could be measured."""
    frames = []
    for name, group in groups.items():
        values = {metric: entry.measure(group) for metric, entry in of_networks().items()}
        columns = {metric: value.numpy() for metric, value in values.items() if value is not None}
        frames.append(pd.DataFrame({"group": name, "index": range(len(group.networks)), **columns}))
    return pd.concat(frames, ignore_index=True)


def similarity_matrices(groups: Mapping[str, Evaluated], generated: Sequence[str] = GENERATED) -> dict[str, Tensor]:
    """Part of the images -> IoU of errors of the originals followed by the generated networks, (n, n).

    Parts without error masks are left out.
    """
    chosen = [groups["original"], *(groups[name] for name in generated)]
    found = {}
    for part in groups["original"].results:
        masks = [group.results[part].wrong for group in chosen]
        if all(mask is not None for mask in masks):
            found[part] = wrong_iou(torch.cat(masks), torch.cat(masks))
    return found


def summary(
    groups: Mapping[str, Evaluated],
    evaluation: pd.DataFrame,
    matrices: Mapping[str, Tensor],
    generated: Sequence[str] = GENERATED,
) -> dict[str, float]:
    """Metrics of a run: statistics over the networks of every group, numbers of whole groups, and the similarities.

    What cannot be measured is left out.

    Args:
        groups: what `evaluated` returns.
        evaluation: its `evaluation_table`.
        matrices: its `similarity_matrices`.
        generated: the groups that come from generators, as in `matrices`.
    """
    metrics = {}
    for name, rows in evaluation.groupby("group", sort=False):
        for metric, entry in of_networks().items():
            if metric in rows:
                metrics |= {f"{metric}/{name}_{s}": float(STATISTICS[s](rows[metric])) for s in entry.statistics}
    for metric, entry in METRICS.items():
        if entry.of_group:
            for name, group in groups.items():
                metrics |= {f"{metric}/{name}{suffix}": value for suffix, value in entry.of_group(group).items()}
    sizes = [len(groups[name].networks) for name in ("original", *generated)]
    for part, matrix in matrices.items():
        family = by_part("similarity")[part]
        original, *others = matrix.split(sizes)
        metrics[f"{family}/original_original"] = mean_between(original[:, : sizes[0]])
        for k, (name, rows) in enumerate(zip(generated, others, strict=True), 1):
            within, between = rows.split(sizes, dim=1)[k], rows[:, : sizes[0]]
            metrics[f"{family}/{name}_{name}"] = mean_between(within)
            metrics[f"{family}/original_{name}"] = between.mean().item()
            metrics[f"{family}/original_{name}_max"] = between.amax(dim=1).mean().item()
    return {name: value for name, value in metrics.items() if value == value}


# -- tables of the report


def votes_table(groups: Mapping[str, Evaluated]) -> pd.DataFrame:
    """One row for each group, part of the images, and number of networks: what their soft votes reach, on average."""
    rows = [
        (name, part, size, vote.accuracy.mean().item(), vote.nll.mean().item(), vote.ece.mean().item())
        for name, group in groups.items()
        for part, result in group.results.items()
        for size, vote in (result.votes or {}).items()
    ]
    return pd.DataFrame(rows, columns=["group", "part", "networks", "accuracy", "nll", "ece"])


def calibration_table(groups: Mapping[str, Evaluated]) -> pd.DataFrame:
    """Reliability diagrams: for each group, part of the images and bin of confidence, its mean and the accuracy."""
    frames = [
        pd.DataFrame(result.reliability.numpy(), columns=["count", "confidence", "accuracy"]).assign(
            group=name, part=part
        )
        for name, group in groups.items()
        for part, result in group.results.items()
        if result.reliability is not None
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def latents_table(groups: Mapping[str, Evaluated]) -> pd.DataFrame:
    """Coordinates of every network on the first two principal axes of the fitted; empty if there is only one."""
    if groups["original"].coordinates.shape[1] < 2:
        return pd.DataFrame()
    frames = []
    for name, group in groups.items():
        x, y = group.coordinates[:, :2].T.numpy()
        frames.append(pd.DataFrame({"group": name, "index": range(len(x)), "component_1": x, "component_2": y}))
    return pd.concat(frames, ignore_index=True)


def spectrum_table(groups: Mapping[str, Evaluated]) -> pd.DataFrame:
    """For each group and principal axis of the fitted: its share of their variance, and the group's rms over theirs."""
    original = groups["original"]
    shares = (original.span.values / original.span.values.sum()).numpy()
    frames = []
    for name, group in groups.items():
        if name != "original" and len(group.networks) > 1:
            ratios = dispersion(group.coordinates, original.coordinates)[1].numpy()
            columns = {"component": range(1, len(shares) + 1), "variance_share": shares, "rms_ratio": ratios}
            frames.append(pd.DataFrame({"group": name, **columns}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def layers_table(groups: Mapping[str, Evaluated]) -> pd.DataFrame:
    """Mean and standard deviation of the numbers in each generated tensor, over all networks of each group."""
    rows = []
    for name, group in groups.items():
        state = group.networks[0]
        for tensor, stacked in group.networks.tensors.items():
            if is_generated(tensor, state[tensor]):
                means = torch.stack([numbers.mean(dtype=torch.float64) for numbers in stacked])
                variances = torch.stack([numbers.var(correction=0).double() for numbers in stacked])
                std = (variances.mean() + means.var(correction=0)).sqrt()
                rows.append((name, tensor, means.mean().item(), std.item()))
    return pd.DataFrame(rows, columns=["group", "tensor", "mean", "std"])
