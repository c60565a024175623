"""Warm starts: how many steps of training generated networks still need, beside averages and fresh initialisations."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from pdiff.experiment.metrics import STARTS, find
from pdiff.experiment.prepared import base_network, load_images, new_network
from pdiff.experiment.schema import Experiment
from pdiff.method.collection import Collection
from pdiff.method.log import ignore
from pdiff.method.training import resolve_device
from pdiff.networks.options import SeedsOptions
from pdiff.networks.predict import accuracy, predictions
from pdiff.networks.runs import train_all
from pdiff.seeds import stream

RATES = (1.0, 0.1)  # of the learning rate of the originals: a start that is good already may need a lower one


def warm_start_table(
    experiment: Experiment, prepare: Path, groups: Mapping[str, Collection], folder: Path
) -> pd.DataFrame:
    """Mean validation accuracy of networks that are trained on, as the originals were, but for fewer steps.

    Each number of steps is a separate training, with the whole schedule of the originals, at the better of RATES. All
    groups meet the same batches.

    Args:
        experiment: with networks from seeds; `evaluate.warm_start` are the steps.
        prepare: folder of the base network.
        groups: those of STARTS that there are, beside others.
        folder: of finished trainings.

    Returns:
        One row for each group and number of steps, 0 the first: group, steps, accuracy.
    """
    images, count = load_images(experiment), experiment.evaluate.baseline_count
    device, seed = resolve_device(experiment.device), stream(experiment.seed, "warm_start")
    base, names = base_network(experiment, images, prepare), list(groups["generated"].tensors)
    recipe = experiment.prepare.collect.part(SeedsOptions)

    def initialised(k: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(stream(stream(seed, "fresh"), k))
        state = new_network(experiment, images).state_dict()
        return {name: state[name] for name in names}

    def reached(networks: Collection) -> float:
        predicted = predictions(base, networks, images.validation, device=device, label="warm start")
        return accuracy(predicted, images.validation.labels).mean().item()

    def trained(start: Collection, steps: int, rate: float, path: Path) -> Collection:
        def made(k: int) -> nn.Module:
            network = deepcopy(base)
            network.load_state_dict(start[k % len(start)], strict=False)  # an average is one network
            return network.train()

        changed = {"networks": count, "steps": steps, "snapshots": 1, "learning_rate": rate * recipe.learning_rate}
        options = {"seed": seed, "device": device, "log": ignore, "folder": path}
        return train_all(made, images.train, recipe.model_copy(update=changed), names, **options).collection

    starts = {**groups, "fresh": Collection.stack([initialised(k) for k in range(count)])}
    rows = []
    for group in (name for name in STARTS if name in starts):
        start = starts[group].select(slice(count))
        rows.append((group, 0, reached(start)))
        for steps in experiment.evaluate.warm_start:
            found = (trained(start, steps, rate, folder / f"{group}_{steps}_{rate:g}") for rate in RATES)
            rows.append((group, steps, max(map(reached, found))))
    return pd.DataFrame(rows, columns=["group", "steps", "accuracy"])


def fewest_steps(table: pd.DataFrame, target: float) -> dict[str, float]:
    """`warm_start/steps_<group>` -> the fewest of the steps after which a group is as accurate; nothing where none is.

    Args:
        table: of `warm_start_table`.
        target: the mean validation accuracy of the originals.
    """
    enough = table[table["accuracy"] >= target].groupby("group", sort=False)["steps"].min()
    return {f"warm_start/steps_{group}": float(steps) for group, steps in enough.items()}


def sentence(table: pd.DataFrame, target: float) -> str:
    """What the verdict says of it."""
    found, most = fewest_steps(table, target), table["steps"].max()
    needed = [
        f"{group} {found[name]:.0f}" if (name := f"warm_start/steps_{group}") in found else f"{group} more than {most}"
        for group in table["group"].unique()
    ]
    text = find("val_accuracy").text(target)
    return f"A good start? Steps of training until a mean of {text} % on validation images: {', '.join(needed)}."
