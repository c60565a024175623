"""TODO experiment.prepare."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from pdiff.errors import UserError
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import fresh_network
from pdiff.experiment.schema import Experiment
from pdiff.files import (
    read_tensors,
    write_json,
    write_tensors,
)
from pdiff.method.collection import Collection, StateDict, generated_numbers
from pdiff.method.log import Log, measured
from pdiff.method.training import resolve_device
from pdiff.networks import datasets
from pdiff.networks.images import Images
from pdiff.networks.imported.plain import first_template, read_collection
from pdiff.networks.populations import collect, generated_names, pretrain
from pdiff.networks.predict import network_accuracy
from pdiff.parallel.ranks import rank_zero_first
from pdiff.seeds import sample_seed


def prepare(experiment: Experiment, out: Path, log: Log) -> Metrics:
    """Pretrain a network and collect checkpoints of its generated parameters, or adopt somebody's.

    Writes `checkpoints.safetensors` and `.json`, `history.csv`; where data set and network are known also
    `network.safetensors`, `dataset.json`.
    """
    history = History(out, log)
    with rank_zero_first():  # it may download
        images = datasets.load(experiment.dataset) if experiment.dataset else None
    make = _adopted if experiment.prepare.source else _collected
    collection = make(experiment, images, out, history)
    if images:
        _describe(experiment, images, out / "dataset.json")
    collection.save(out / "checkpoints.safetensors")
    history.save(out / "history.csv")
    return {"checkpoints": len(collection), "generated_parameters": generated_numbers(collection[0])}


def _adopted(experiment: Experiment, images: Images | None, out: Path, log: Log) -> Collection:
    """Read somebody's checkpoints; where their architecture is known, write the base network."""
    source, exclude = Path(experiment.prepare.source).expanduser(), experiment.prepare.exclude
    collection = read_collection(source, experiment.prepare.parameters, exclude)
    if images:
        pretrained = experiment.network.pretrained
        network = fresh_network(experiment, images, pretrained=pretrained)
        _load_into(network, first_template(source, exclude).state, source, complete=not pretrained)
        write_tensors(out / "network.safetensors", network.state_dict())
    return collection


def _collected(experiment: Experiment, images: Images, out: Path, log: Log) -> Collection:
    """Pretrain (unless an earlier run has done so), write the base network, collect."""
    settings, state, device = experiment.prepare, out / STATE, resolve_device(experiment.device)
    with rank_zero_first():  # it may download, too
        network = fresh_network(experiment, images, pretrained=experiment.network.pretrained).to(device)
    names = generated_names(network, settings.parameters)
    validate = partial(network_accuracy, images=images.validation, batch_size=500, device=device)
    seeds = [sample_seed(experiment.seed, k) for k in range(2)]
    if (out / "network.safetensors").exists():
        network.load_state_dict(read_tensors(out / "network.safetensors"))
    else:
        with measured(log, "pretrain"):
            path = state / "pretrain.pt"
            pretrain(network, images, settings.pretrain, seed=seeds[0], accuracy=validate, log=log, path=path)
        write_tensors(out / "network.safetensors", network.state_dict())
    with measured(log, "collect"):
        return collect(network, images, settings.collect, names, seed=seeds[1], log=log, path=state / "collect.pt")


def _load_into(network: nn.Module, state: StateDict, source: Path, *, complete: bool) -> None:
    """Put a checkpoint into the base network; where it must be `complete`, it holds all of the network's parameters.

    Raises:
        UserError: tensors that the network has not, or has in another shape or kind; or that the checkpoint lacks.
    """
    own = network.state_dict()
    for name, tensor in state.items():
        fits = name in own and own[name].shape == tensor.shape
        if not fits or own[name].is_floating_point() != tensor.is_floating_point():
            expected = f"{tuple(own[name].shape)} {own[name].dtype}" if name in own else "no such tensor"
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise UserError(f"prepare.source {source}: {name} is {found}, but the network has {expected}")
    missing = [name for name, _ in network.named_parameters() if name not in state]
    if complete and missing:
        raise UserError(
            f"prepare.source {source}: the files lack {len(missing)} parameters of the network, such as {missing[0]}; "
            f"the rest of the network would be random (network.pretrained is false)"
        )
    network.load_state_dict(state, strict=False)


def _describe(experiment: Experiment, images: Images, path: Path) -> None:
    """Write what the data set is, for whoever tracks it."""
    parts = {part: len(getattr(images, part)) for part in ("train", "validation", "test")}
    write_json(path, {"name": experiment.dataset.name, "digest": images.digest(), "classes": images.classes, **parts})
