"""The stage `pretrain`: the base network, trained before any checkpoint is collected."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pdiff.experiment import limits
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import load_images, make_network
from pdiff.experiment.schema import Experiment
from pdiff.files import write_tensors
from pdiff.method.log import Log, measured
from pdiff.method.training import resolve_device
from pdiff.networks import populations
from pdiff.networks.predict import network_accuracy
from pdiff.parallel.ranks import rank_zero_first
from pdiff.seeds import stream


def pretrain(experiment: Experiment, out: Path, log: Log) -> Metrics:
    """Make the network of an experiment and train it. Writes `network.safetensors`, `history.csv`.

    Raises:
        UserError: among others, `prepare.parameters` match nothing, or the checkpoints will not fit into this machine,
            which is found out before the training.
    """
    history, settings, device = History(out, log), experiment.prepare, resolve_device(experiment.device)
    images = load_images(experiment)
    with rank_zero_first():  # it may download weights
        network = make_network(experiment, images, pretrained=experiment.network.pretrained).to(device)
    size = populations.generated_size(network, settings.parameters)
    limits.check(experiment, ["pretrain", "prepare"], out, size=size)
    validate = partial(network_accuracy, images=images.validation, batch_size=500, device=device)
    with measured(history, "pretrain"):
        options = {"seed": stream(experiment.seed, "pretrain"), "accuracy": validate, "log": history}
        populations.pretrain(network, images, settings.pretrain, path=out / STATE / "pretrain.pt", **options)
    write_tensors(out / "network.safetensors", network.state_dict())
    return {}
