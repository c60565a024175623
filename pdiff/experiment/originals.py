"""The stage `originals`: how good the collected networks are, whatever is generated from them."""

from __future__ import annotations

from pathlib import Path

from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import base_network, load_images, original_networks
from pdiff.experiment.schema import Experiment
from pdiff.files import copy_file, read_tensors
from pdiff.method.log import Log, measured
from pdiff.method.training import resolve_device
from pdiff.networks import evaluators
from pdiff.networks.evaluators import Judge
from pdiff.networks.imported.plain import Template, first_file


def originals(experiment: Experiment, out: Path, log: Log, *, prepare: Path) -> Metrics:
    """Evaluate the original networks. Writes `original.*`, a file of the evaluator, and `history.csv`."""
    history, group = History(out, log), original_networks(experiment, prepare)
    with measured(history, "originals"):
        evaluator(experiment, prepare)({"original": group}, out / STATE)
    for path in sorted((out / STATE).glob("original.*")):
        copy_file(path, out / path.name)
    return {}


def evaluator(experiment: Experiment, prepared: Path) -> Judge:
    """How the networks of an experiment are evaluated."""
    settings = experiment.evaluate
    if settings.function or settings.command:
        template = _template(experiment, prepared)
        if settings.function:
            return evaluators.by_function(settings.function, template, workers=settings.workers)
        options = {"folder": Path(settings.folder).expanduser().absolute(), "pattern": settings.pattern}
        return evaluators.by_command(settings.command, template, workers=settings.workers, **options)
    if not experiment.dataset:
        return evaluators.unknown
    images = load_images(experiment)
    parts = {"validation": images.validation} | ({"test": images.test} if settings.test else {})
    options = {"batch_size": settings.batch_size, "device": resolve_device(experiment.device)}
    return evaluators.on_images(base_network(experiment, images, prepared), parts, **options)


def _template(experiment: Experiment, prepared: Path) -> Template:
    """How files of the networks are laid out: as those of `prepare.source`, or plainly, with all tensors."""
    if experiment.prepare.source:
        return first_file(Path(experiment.prepare.source).expanduser(), experiment.prepare.exclude)
    return Template.of(read_tensors(prepared / "network.safetensors"))
