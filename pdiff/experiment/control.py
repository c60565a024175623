"""Control: do networks have the accuracy that they are asked for? Some are sampled for other values, and measured."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pdiff.experiment.metrics import CONTROL, CONTROLLED, find
from pdiff.experiment.population import Population
from pdiff.method.collection import Collection
from pdiff.method.generators.base import Generator
from pdiff.method.statistics import slope_replicates

LEVELS = 5  # accuracies that networks are asked for, evenly spaced
RANGE = (0.05, 0.95)  # quantiles of the fitted networks' accuracies, the first and the last of those


def sampled(generator: Generator, prepare: Path, count: int, *, first: int, **options: Any) -> Collection:
    """Networks that are asked for accuracies between those of the worst and of the best fitted networks.

    Args:
        generator: conditioned on validation accuracy, among others.
        prepare: folder with the description of the population.
        count: how many networks; each of the LEVELS has as many, but for one.
        first: number of the first one, see `Generator.sample`.
        options: of `Generator.sample`.

    Returns:
        The networks, each named by what it was asked for and its number.
    """
    known = torch.tensor([value for value in Population.load(prepare).column(CONTROLLED) if value is not None])
    levels = torch.linspace(*known.quantile(torch.tensor(RANGE)).tolist(), LEVELS)
    parts = []
    for level, numbers in zip(levels.tolist(), torch.arange(first, first + count).tensor_split(LEVELS), strict=True):
        if len(numbers):
            condition = {**options["condition"], CONTROLLED: level}
            part = generator.sample(len(numbers), first=int(numbers[0]), **options | {"condition": condition})
            parts.append((part, [f"{level:.6g} {k}" for k in numbers.tolist()]))
    return Collection.concatenate([part for part, _ in parts], [name for _, names in parts for name in names])


def control_table(names: list[str], accuracy: Tensor) -> pd.DataFrame:
    """One row for each of the networks of `sampled`: the accuracy that it was asked for, and the one that it has."""
    return pd.DataFrame({"asked": [float(name.split()[0]) for name in names], "obtained": accuracy.numpy()})


def slope(control: pd.DataFrame) -> dict[str, float]:
    """Metrics: the slope of the obtained accuracy over that which was asked for, with its 95 % interval.

    1 where networks are as they are asked to be, 0 where they do not care. Nothing where all were asked for the same.
    """
    asked, obtained = (torch.tensor(control[name].tolist(), dtype=torch.float64) for name in ("asked", "obtained"))
    found = slope_replicates(asked, obtained, seed=0)
    low, high = found.interval()
    return {name: v for name, v in zip(CONTROL, (found.value, low, high), strict=True) if isfinite(v)}


def sentence(control: pd.DataFrame, metrics: Mapping[str, float]) -> str:
    """What the verdict says of it."""
    means, text = control.groupby("asked")["obtained"].mean(), find(CONTROLLED).text
    levels = ", ".join(f"{text(asked)} % have {text(mean)} %" for asked, mean in means.items())
    begin = f"Obedient? Networks that are asked for {levels} on validation images on average"
    if CONTROL[0] not in metrics:
        return f"{begin}."
    value, low, high = (metrics[name] for name in CONTROL)
    return f"{begin}: a slope of {value:.2f}, 95 % interval {low:.2f} to {high:.2f}."
