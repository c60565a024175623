"""The stage `generate`: sample networks from the generator."""

from __future__ import annotations

from pathlib import Path

from pdiff.experiment import control, limits
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import with_statistics
from pdiff.experiment.schema import Experiment
from pdiff.method.collection import Collection
from pdiff.method.generators.base import Generator
from pdiff.method.log import Log, measured
from pdiff.method.training import resolve_device


def generate(experiment: Experiment, out: Path, log: Log, *, train: Path, prepare: Path) -> Metrics:
    """Sample networks, batch by batch; an interrupted run goes on after its last whole batch.

    Writes `generated.safetensors` and `.json`, and with `generate.trajectory_every` also `trajectory.safetensors` and
    `.json`: the first samples on their way from noise, each named by its timestep and its number. Where networks are
    conditioned on their accuracy, writes `control.safetensors` and `.json`: networks asked for several accuracies.
    """
    history, settings = History(out, log), experiment.generate
    generator, device = Generator.load(train / "generator"), resolve_device(experiment.device)
    limits.check(experiment, ["generate"], out, size=generator.standardizer.size)
    generator.warm_up(**experiment.sampling)
    options = {"seed": settings.seed, "device": device, **experiment.sampling}
    parts = []
    with measured(history, "generate"):
        for first in range(0, settings.count, settings.batch_size):
            count = min(settings.batch_size, settings.count - first)
            path = out / STATE / f"{first}_{first + count}.safetensors"
            if not path.exists():
                label = f"generate {first + count}/{settings.count}"
                generator.sample(count, first=first, label=label, **options).save(path)
            parts.append(Collection.load(path))
        networks = with_statistics(experiment, prepare, Collection.concatenate(parts), "generated")
    networks.save(out / "generated.safetensors")
    if every := getattr(settings, "trajectory_every", 0):
        count = min(settings.trajectory_count, settings.count)
        looks = list(generator.trajectory(count, every=every, **options))
        names = [f"{t:g} {k}" for t, _ in looks for k in range(count)]
        trajectory = Collection.concatenate([networks for _, networks in looks], names)
        with_statistics(experiment, prepare, trajectory, "trajectory").save(out / "trajectory.safetensors")
    if count := experiment.control_count:
        asked = control.sampled(generator, prepare, count, first=settings.count, label="control", **options)
        with_statistics(experiment, prepare, asked, "control").save(out / "control.safetensors")
    return {"generated": settings.count}
