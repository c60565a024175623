"""The stage `originals`: how good the collected networks are, whatever is generated from them."""

from __future__ import annotations

from pathlib import Path

from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import base_network, load_images, original_networks
from pdiff.experiment.schema import Experiment
from pdiff.files import copy_file, read_tensors
from pdiff.method.log import Log, measured
from pdiff.method.training import resolve_device
from pdiff.networks.evaluators import Context, Evaluator
from pdiff.networks.imported.plain import first_template
from pdiff.networks.imported.template import Template


def originals(experiment: Experiment, out: Path, log: Log, *, prepare: Path) -> Metrics:
    """Evaluate the original networks. Writes `original.*`, a file of the evaluator, and `history.csv`."""
    history, group = History(out, log), original_networks(experiment, prepare)
    with measured(history, "originals"):
        evaluator(experiment, prepare)({"original": group}, out / STATE)
    for path in sorted((out / STATE).glob("original.*")):
        copy_file(path, out / path.name)
    return {}


def evaluator(experiment: Experiment, prepared: Path) -> Evaluator:
    """The evaluator of an experiment, with what it needs of the stage `prepare`."""
    context = Context(
        network=lambda: base_network(experiment, load_images(experiment), prepared),
        images=lambda: load_images(experiment),
        template=lambda: _template(experiment, prepared),
        device=resolve_device(experiment.device),
    )
    return experiment.evaluator.make(context)


def _template(experiment: Experiment, prepared: Path) -> Template:
    """How files of the networks are laid out: as those of `prepare.source`, or plainly, with all tensors."""
    if experiment.prepare.source:
        return first_template(Path(experiment.prepare.source).expanduser(), experiment.prepare.exclude)
    return Template.of(read_tensors(prepared / "network.safetensors"))
