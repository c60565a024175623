"""The stage `train`: fit a generator on the collection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.experiment import limits
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.population import Population
from pdiff.experiment.prepared import base_network, evenly_spaced, load_images, original_networks, unit_groups
from pdiff.experiment.schema import Experiment
from pdiff.method.collection import Collection, generated_numbers, is_generated
from pdiff.method.generators.base import Generator
from pdiff.method.generators.neurons import Outputs
from pdiff.method.log import Log, Point, ignore
from pdiff.method.training import resolve_device
from pdiff.networks import batchnorm
from pdiff.networks.behaviour import output_distances
from pdiff.networks.predict import accuracy, predictions

RECONSTRUCTED = 16  # checkpoints whose reconstruction is evaluated


def train(experiment: Experiment, out: Path, log: Log, *, prepare: Path) -> Metrics:
    """Fit the generator on the collection. Writes `generator/`, `history.csv`."""
    history, device = History(out, log), resolve_device(experiment.device)
    collection = original_networks(experiment, prepare)
    limits.check(experiment, ["train"], out, size=generated_numbers(collection[0]), device=device.type)
    if experiment.generate.batchnorm != "generate":
        batchnorm.statistics(collection, base_network(experiment, load_images(experiment), prepare))
    if not any(is_generated(name, collection[0][name]) for name in collection.varying()):
        equal = "the 1 checkpoint" if len(collection) == 1 else f"{len(collection)} equal checkpoints"
        tqdm.write(f"warning: the generator is fitted on {equal}: every network that it generates will be a copy")
    check = ignore
    if experiment.dataset and hasattr(experiment, "autoencoder"):
        check = partial(check_reconstruction, experiment, collection, prepare, history)
    options = {"seed": experiment.seed, "device": device, "log": history, "state": out / STATE, "check": check}
    chosen = experiment.generator_options
    inputs: dict[str, Callable[[], Any]] = {
        "groups": lambda: unit_groups(experiment, prepare),
        "conditions": lambda: conditions(Population.load(prepare), chosen.columns)[: len(collection)],
        "outputs": lambda: outputs(experiment, prepare, device),
    }
    generator = Generator.fit(collection, chosen, **options, **{name: inputs[name]() for name in chosen.inputs})
    generator.save(out / "generator")
    sizes = generator.sizes()
    asked, used = getattr(getattr(experiment, "autoencoder", None), "latent_size", "auto"), sizes.get("latent_size", 0)
    if asked != "auto" and used < asked:
        span = f"the {len(collection)} checkpoints, without those held out, span no more dimensions"
        tqdm.write(f"warning: autoencoder.latent_size {asked}: {used} are used (metric latent_size); {span}")
    return sizes | (generator.diagnostics.final() if generator.diagnostics else {})


def outputs(experiment: Experiment, prepared: Path, device: torch.device) -> Outputs:
    """How far the outputs of networks are from those of others on training images, see `output_distances`."""
    images = load_images(experiment)
    count = experiment.generator_options.behaviour.behaviour_images
    return output_distances(base_network(experiment, images, prepared), images.train, images=count, device=device)


def conditions(population: Population, columns: Sequence[str]) -> Tensor:
    """The values of some columns for the checkpoints that generators are fitted on, (N, C); NaN where there is none.

    Raises:
        UserError: a column that is not there, or holds something else than numbers.
    """
    found = []
    for name in columns:
        values = population.column(name)
        if wrong := [value for value in values if not (value is None or isinstance(value, int | float))]:
            raise UserError(f"generator.condition {name}: expected a column of numbers, but it holds {wrong[0]!r}")
        found.append([math.nan if value is None else float(value) for value in values])
    return torch.tensor(found).T


def check_reconstruction(
    experiment: Experiment,
    collection: Collection,
    prepared: Path,
    log: Log,
    reconstruct: Callable[[Collection], Collection],
) -> None:
    """Log the validation accuracy of a few checkpoints before and after the autoencoder; warn of a large drop.

    Raises:
        UserError: the drop is too large, and `autoencoder.on_accuracy_drop` is stop.
    """
    settings, device = experiment.autoencoder, resolve_device(experiment.device)
    images = load_images(experiment)
    network = base_network(experiment, images, prepared)
    some = evenly_spaced(collection, RECONSTRUCTED)
    options = {"device": device, "label": "reconstruction"}
    before, after = (
        accuracy(predictions(network, group, images.validation, **options), images.validation.labels).mean()
        for group in (some, reconstruct(some))
    )
    log(Point("autoencoder/original_val_accuracy", before.item()))
    log(Point("autoencoder/reconstruction_val_accuracy", after.item()))
    if before - after > settings.max_accuracy_drop:
        message = (
            f"autoencoder: reconstructed networks reach {after:.2%} on validation images, {before:.2%} before; "
            f"autoencoder.max_accuracy_drop is {settings.max_accuracy_drop}"
        )
        if settings.on_accuracy_drop == "stop":
            raise UserError(message)
        tqdm.write(f"warning: {message}")
