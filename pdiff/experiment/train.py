"""TODO experiment.train."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import base_network, evenly_spaced, load_images, original_networks
from pdiff.experiment.schema import Experiment
from pdiff.method.collection import Collection
from pdiff.method.generators import (
    Generator,
    fit_autoencoder,
    fit_denoiser,
    heldout_split,
    latent_scale,
    make_diffusion,
)
from pdiff.method.log import Log, Point, measured
from pdiff.method.standardize import Standardizer
from pdiff.method.training import resolve_device
from pdiff.networks.predict import accuracy, predictions
from pdiff.seeds import sample_seed

RECONSTRUCTED = 16  # checkpoints whose reconstruction is evaluated


def train(experiment: Experiment, out: Path, log: Log, *, prepare: Path) -> Metrics:
    """Fit the generator on the collection. Writes `generator/`, `history.csv`."""
    history, device, state = History(out, log), resolve_device(experiment.device), out / STATE
    collection = original_networks(experiment, prepare)
    seeds = [sample_seed(experiment.seed, k) for k in range(2, 5)]
    fitted, held = heldout_split(len(collection), experiment.diffusion.heldout_fraction, seed=seeds[0])
    standardizer = Standardizer.fit(collection.select(fitted))
    vectors = standardizer.encode(collection)
    common = {"log": history, "device": device}
    with measured(history, "autoencoder"):
        path = state / "autoencoder.pt"
        autoencoder = fit_autoencoder(vectors[fitted], experiment.autoencoder, seed=seeds[1], path=path, **common)
    if experiment.dataset:
        _check_reconstruction(experiment, collection, standardizer, autoencoder, prepare, history)
    latents = _encoded(autoencoder, vectors, device)
    mean, std = latent_scale(latents[fitted], standardize=experiment.diffusion.standardize_latents)
    latents, diffusion = (latents - mean) / std, make_diffusion(experiment.diffusion)
    denoiser = None
    if experiment.diffusion.steps:
        with measured(history, "diffusion"):
            parts = {"latents": latents[fitted], "heldout": latents[held], "settings": experiment.diffusion}
            denoiser = fit_denoiser(diffusion, **parts, seed=seeds[2], path=state / "diffusion.pt", **common)
    Generator(standardizer, autoencoder, mean, std, denoiser, diffusion).save(out / "generator")
    return {"latent_size": latents.shape[1]}


@torch.inference_mode()
def _encoded(autoencoder: nn.Module, vectors: Tensor, device: torch.device) -> Tensor:
    """Latents of vectors, (N, L), on the CPU."""
    return torch.cat([autoencoder.encode(rows.to(device)).cpu() for rows in vectors.split(256)])


@torch.inference_mode()
def _check_reconstruction(
    experiment: Experiment,
    collection: Collection,
    standardizer: Standardizer,
    autoencoder: nn.Module,
    prepared: Path,
    log: Log,
) -> None:
    """Accuracy on validation images of a few checkpoints, before and after the autoencoder; a large drop is told."""
    settings, device = experiment.autoencoder, resolve_device(experiment.device)
    images = load_images(experiment)
    network = base_network(experiment, images, prepared)
    some = evenly_spaced(collection, RECONSTRUCTED)
    decoded = standardizer.decode(autoencoder(standardizer.encode(some).to(device)).cpu())
    before, after = (
        accuracy(
            predictions(network, group, images.validation, device=device, label="reconstruction"),
            images.validation.labels,
        ).mean()
        for group in (some, decoded)
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
