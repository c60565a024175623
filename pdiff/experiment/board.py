"""The leaderboard of an audit of several generators: a row for every group of networks, null arms among them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isnan, nan

import pandas as pd

from pdiff.experiment.metrics import MISSING, by_part, find

KINDS = {"original": "original", "heldout": "original", "reconstruction": "reconstruction"}
COLUMNS = ("accuracy", "novelty", "novel_performant", "z_u", "vote_accuracy")
TAU = 0.5  # of the novelty of held-out networks: from there on a network counts as novel
VOTERS = 4  # networks in a vote


def board(metrics: Mapping[str, float], groups: Collection[str], generated: Sequence[str]) -> pd.DataFrame:
    """One row a group: group, kind, part, and the numbers in COLUMNS, NaN where they were not measured.

    The first has the largest share of networks that are novel and performant, at equal shares the highest accuracy.
    Where novelty is unknown, accuracy alone decides; where accuracy is unknown, how near Z_U is to 0: far below it are
    copies, far above it is noise.

    Args:
        metrics: of the run, by name.
        groups: the groups of networks.
        generated: those that come from generators.
    """
    accuracies = by_part("accuracy")
    part = next((part for part in ("test", "validation") if f"{accuracies[part]}/original_mean" in metrics), "")
    rows = []
    for name in groups:
        kind = KINDS.get(name, "generator" if name in generated else "null arm")
        rows.append({"group": name, "kind": kind, "part": part, **_numbers(metrics, name, part)})
    table = pd.DataFrame(rows)
    keys = {"novel_performant": False, "accuracy": False, "distance": True}
    table = table.assign(distance=table["z_u"].abs())
    return table.sort_values(list(keys), ascending=list(keys.values()), kind="stable").drop(columns="distance")


def _numbers(metrics: Mapping[str, float], name: str, part: str) -> dict[str, float]:
    """The numbers of one group."""
    names = {
        "accuracy": f"{by_part('accuracy').get(part)}/{name}_mean",
        "novelty": f"novelty/{name}_median",
        "novel_performant": f"{by_part('novel and performant').get(part)}/{name}_{TAU:g}",
        "z_u": f"z_u/{name}",
        "vote_accuracy": f"{by_part('vote accuracy').get(part)}/{name}_{VOTERS}",
    }
    return {column: metrics.get(names[column], nan) for column in COLUMNS}


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """The board as text for people; columns without any number are left out."""
    part = next((part for part in table["part"] if isinstance(part, str)), "")  # NaN in a file
    headings = {
        "accuracy": f"{part} %",
        "novelty": "novelty",
        "novel_performant": f"novel and performant ({TAU:g}) %",
        "z_u": "Z_U",
        "vote_accuracy": f"vote of {VOTERS} %",
    }
    shown = table[["group", "kind"]].copy()
    for column, heading in headings.items():
        metric = find("test_accuracy" if column == "accuracy" else column)
        shown[heading] = [MISSING if isnan(value) else metric.text(value) for value in table[column]]
    return shown.loc[:, (shown != MISSING).any()]
