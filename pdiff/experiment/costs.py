"""The cost ledger: seconds and peak memory of every stage, per network, and what as many originals cost to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from pdiff.experiment.history import HISTORY, SECONDS
from pdiff.method.log import names_of_measured

MEMORY = names_of_measured("")[1]  # the beginning of the names of memory metrics
TRAINED = ("pretrain", "prepare")  # what it takes to train originals
FITTED = ("train", "generate")  # what it takes to generate networks


def costs_table(folders: Mapping[str, Path], networks: Mapping[str, int]) -> pd.DataFrame:
    """One row a stage: seconds, peak memory in MB, networks, seconds per network; and one for as many originals.

    Args:
        folders: stage -> its folder, with its history.
        networks: stage -> how many networks it deals with; `prepare` and `generate` among them.
    """
    rows = []
    for stage, folder in folders.items():
        history = pd.read_csv(folder / HISTORY)
        last = history.groupby("name")["value"].last()
        seconds = last[last.index.str.startswith(SECONDS)].sum()
        memory = last[last.index.str.startswith(MEMORY)].max()
        rows.append((stage, seconds, memory, networks.get(stage), ", ".join(_parts(last))))
    table = pd.DataFrame(rows, columns=["stage", "seconds", "memory_mb", "networks", "note"]).set_index("stage")
    trained = table["seconds"].reindex(TRAINED).sum()
    if trained and {"prepare", "generate"} <= networks.keys():
        count = networks["generate"]
        ours = table["seconds"].reindex(FITTED).sum()
        table.loc["training as many originals"] = {
            "seconds": trained * count / networks["prepare"],
            "networks": count,
            "note": f"as the collection was made; fitting and sampling took {ours:.1f} s",
        }
    table["seconds_per_network"] = table["seconds"] / table["networks"]
    return table.reset_index()


def _parts(last: pd.Series) -> list[str]:
    """The measured parts of a stage, with their seconds, where there are several."""
    parts = {name.removeprefix(SECONDS): value for name, value in last.items() if name.startswith(SECONDS)}
    return [f"{name} {value:.1f} s" for name, value in parts.items()] if len(parts) > 1 else []
