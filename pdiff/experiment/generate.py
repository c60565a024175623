"""TODO experiment.generate."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.schema import Experiment
from pdiff.method.collection import Collection, not_finite
from pdiff.method.generators import (
    Generator,
)
from pdiff.method.log import Log, measured
from pdiff.method.training import resolve_device
from pdiff.seeds import sample_seed


def generate(experiment: Experiment, out: Path, log: Log, *, train: Path) -> Metrics:
    """Draw networks. Writes `generated.safetensors` and `.json`, and where they are wanted `trajectory.safetensors`
    and `.json`: the first draws on their way, each named by its timestep and its number."""
    history, settings = History(out, log), experiment.generate
    generator, device = Generator.load(train / "generator"), resolve_device(experiment.device)
    if generator.denoiser:
        generator.diffusion.scheduler(experiment.sampler)  # imports diffusers now, so that the measure is of the draw
    batches = [
        range(settings.count)[k : k + settings.batch_size] for k in range(0, settings.count, settings.batch_size)
    ]
    drawn = []
    with measured(history, "generate"):
        for rows in batches:
            drawn.append(
                _drawn(generator, experiment, rows, device, out / STATE / f"{rows.start}_{rows.stop}.safetensors")
            )
    tensors = {name: torch.cat([part.tensors[name] for part in drawn]) for name in drawn[0].tensors}
    Collection(tensors).save(out / "generated.safetensors")
    if settings.trajectory_every:
        _trajectory(generator, experiment, device).save(out / "trajectory.safetensors")
    return {"generated": settings.count}


def _draw_options(experiment: Experiment, device: torch.device, label: str) -> dict:
    """How the generator of an experiment samples."""
    bar = partial(tqdm, desc=label, unit="step", disable=None)
    return {"sampler": experiment.sampler, "steps": experiment.sampling_steps, "device": device, "progress": bar}


def _trajectory(generator: Generator, experiment: Experiment, device: torch.device) -> Collection:
    """The first draws at intermediate timesteps."""
    settings = experiment.generate
    count = min(settings.trajectory_count, settings.count)
    seeds = [sample_seed(settings.seed, k) for k in range(count)]
    options = _draw_options(experiment, device, "trajectory")
    passed = generator.trajectory(seeds, every=settings.trajectory_every, **options)
    names = [f"{t:g} {k}" for t, _ in passed for k in range(count)]
    collections = [collection for _, collection in passed]
    return Collection({n: torch.cat([c.tensors[n] for c in collections]) for n in collections[0].tensors}, names)


def _drawn(generator: Generator, experiment: Experiment, rows: range, device: torch.device, path: Path) -> Collection:
    """One batch of networks; read, if an interrupted run has drawn it.

    Raises:
        UserError: a network with NaN or infinity in it, which `Collection.load` would refuse.
    """
    if path.exists():
        return Collection.load(path)
    seeds = [sample_seed(experiment.generate.seed, k) for k in rows]
    label = f"generate {rows.stop}/{experiment.generate.count}"
    drawn = generator.sample(seeds, **_draw_options(experiment, device, label))
    if name := not_finite(drawn.tensors):
        raise UserError(f"generate: {name} of a generated network holds NaN or infinity; the generator diverged")
    drawn.save(path)
    return drawn
