"""The stage `prepare`: the collection of checkpoints that a generator is fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.experiment import limits, source
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.population import Population
from pdiff.experiment.prepared import (
    ALIGNMENT,
    alignment_options,
    base_network,
    load_images,
    make_network,
    new_network,
    unit_groups,
)
from pdiff.experiment.schema import Experiment
from pdiff.files import copy_file, write_json, write_tensors
from pdiff.method.alignment.reference import Reference
from pdiff.method.collection import Collection, StateDict, generated_numbers, heldout_split
from pdiff.method.log import Log, measured
from pdiff.method.provenance import Provenance
from pdiff.method.training import resolve_device
from pdiff.networks.images import Images
from pdiff.networks.imported.plain import read_checkpoints
from pdiff.networks.imported.zoo import columns
from pdiff.networks.patterns import matching
from pdiff.networks.populations import branches, collect, generated_names
from pdiff.networks.predict import accuracy, predictions
from pdiff.networks.runs import train_all
from pdiff.parallel import ranks
from pdiff.seeds import stream


def prepare(experiment: Experiment, out: Path, log: Log, *, pretrain: Path | None = None) -> Metrics:
    """Collect checkpoints of the generated parameters, or read them from the files of `prepare.source`.

    Writes `checkpoints.safetensors` and `.json`, what generators are fitted on; `heldout.safetensors` and `.json`, the
    checkpoints that are held out from them, unless there are none; `population.json`, what is known of them;
    `history.csv`; where data set and network are known also `network.safetensors`, `dataset.json`; and where networks
    are aligned, `alignment.safetensors`, with which they can be given back as they were.

    Args:
        experiment: what to collect.
        out: folder to write to.
        log: receives the loss.
        pretrain: folder of the pretrained network, where there is one.
    """
    history, settings = History(out, log), experiment.prepare
    images = load_images(experiment) if experiment.dataset else None
    kind, measured_of_files, equal = experiment.collected_from, {}, []
    if settings.source:
        collection, known = _imported(experiment, images, out)
        found = Provenance.of(collection)
        kind, measured_of_files, equal = _kind(experiment, found), found.figures(), found.equal
        of_runs = {"network": found.runs} if kind in ("seeds", "branches") else {}
        known = {"digest": found.digests} | of_runs | known
    else:
        collection, known = _collected(experiment, images, pretrain, out, history)
    dataset = {}
    if images:
        parts = {part: len(getattr(images, part)) for part in ("train", "validation", "test")}
        dataset = {"name": experiment.dataset.name, "digest": images.digest(), "classes": images.classes, **parts}
        write_json(out / "dataset.json", dataset)
    options = {"seed": stream(experiment.seed, "split"), "groups": known.get("network", ()), "equal": equal}
    fitted, heldout = heldout_split(len(collection), settings.heldout, **options)
    if experiment.aligns(kind):
        with measured(history, "align"):
            collection = _aligned(experiment, collection, fitted, out)
    collection.save(out / "checkpoints.safetensors", fitted)
    if len(heldout):
        collection.save(out / "heldout.safetensors", heldout)
    Population(
        kind=kind,
        recipe={} if settings.source else settings.collect.model_dump(),
        trained_on={} if settings.source else {"dataset": dataset["name"], "images": dataset["train"]},
        columns={"name": collection.names} | known,
        heldout=heldout.tolist(),
        measured=measured_of_files,
    ).save(out)
    sizes = {"checkpoints": len(fitted), "heldout_checkpoints": len(heldout)}
    return sizes | {"generated_parameters": generated_numbers(collection[0])}


def _collected(
    experiment: Experiment, images: Images, pretrain: Path | None, out: Path, log: Log
) -> tuple[Collection, dict[str, list[Any]]]:
    """Checkpoints that are trained here, and what is known of each; the base network is written."""
    settings, device = experiment.prepare, resolve_device(experiment.device)
    network = base_network(experiment, images, pretrain) if pretrain else make_network(experiment, images)
    names, known = generated_names(network, settings.parameters), {}
    options = {"seed": stream(experiment.seed, "collect"), "log": log}
    with measured(log, "collect"):
        if experiment.collected_from == "trajectory":
            path = out / STATE / "collect.pt"
            collection = collect(network.to(device), images, settings.collect, names, path=path, **options)
        else:
            made = branches(network, names) if pretrain else lambda k: new_network(experiment, images).train()
            options |= {"device": device, "folder": out / STATE / "collect"}
            collection, known = train_all(made, images.train, settings.collect, names, **options)
            if not pretrain:
                network.load_state_dict(collection[0], strict=False)
            predicted = predictions(network, collection, images.validation, device=device, label="validate")
            known["val_accuracy"] = accuracy(predicted, images.validation.labels).tolist()
    if pretrain:
        copy_file(pretrain / "network.safetensors", out / "network.safetensors")
    else:
        write_tensors(out / "network.safetensors", network.state_dict())
    return collection, known


def _kind(experiment: Experiment, found: Provenance) -> str:
    """The kind of population that files are: what they are held to be, or else what was measured.

    Raises:
        UserError: they are held to be what they cannot be.
    """
    claim = experiment.prepare.population
    if claim == "auto":
        return found.kind
    if claim not in found.possible:
        where, shown = experiment.prepare.source, " or ".join(found.possible)
        raise UserError(f"prepare.population {claim}: the files in {where} look like {shown}: {found.describe()}")
    return claim


def _aligned(experiment: Experiment, collection: Collection, fitted: Tensor, out: Path) -> Collection:
    """The networks with their units in one order, which those that are held out have no part in.

    Raises:
        UserError: alignment is asked for, and no units of the architecture are known to be interchangeable.
    """
    groups = unit_groups(experiment, out).within(collection.tensors)
    name, reason = next(iter(groups.left_alone.items()), ("", "it has no hidden units"))
    if not len(groups):
        line = f"prepare.align: nothing to permute in {experiment.network.architecture}: {reason}"
        if experiment.prepare.align == "weights":
            raise UserError(line)
        tqdm.write(f"note: {line}")
        return collection
    if groups.left_alone:
        others = f" and {len(groups.left_alone) - 1} more" if len(groups.left_alone) > 1 else ""
        tqdm.write(f"note: prepare.align: units of {name}{others} are not permuted: {reason}")
    reference = Reference.fit(collection, groups, rows=fitted, **alignment_options(experiment))
    aligned, changes = reference.align(collection)
    reference.save(out / ALIGNMENT, changes)
    return aligned


def _imported(experiment: Experiment, images: Images | None, out: Path) -> tuple[Collection, dict[str, list[Any]]]:
    """Checkpoints from files, and what is known of each; where their architecture is, the base network is written."""
    folder, checkpoints = source.folder(experiment.prepare), source.checkpoints(experiment.prepare)
    first = checkpoints[0].read().state
    wanted = [first[name] for name in matching(first, experiment.prepare.parameters)]
    limits.check(experiment, ["prepare"], out, size=sum(t.numel() for t in wanted if t.is_floating_point()))
    if images:
        pretrained = experiment.network.pretrained
        network = make_network(experiment, images, pretrained=pretrained)
        for reason in misfits(network, first, complete=not pretrained):
            raise UserError(f"prepare.source {folder}: {reason}")
        network.load_state_dict(first, strict=False)
        write_tensors(out / "network.safetensors", network.state_dict())
    copy = out / STATE / "files.safetensors"
    with ranks.rank_zero_first():
        if ranks.rank() == 0:
            collection = read_checkpoints(checkpoints, experiment.prepare.parameters, folder)
            if ranks.world() > 1:
                collection.save(copy)
    return collection if ranks.world() == 1 else Collection.load(copy), columns(checkpoints)


def misfits(network: nn.Module, state: StateDict, *, complete: bool) -> list[str]:
    """Why a checkpoint cannot be put into a network; nothing where it can.

    Args:
        network: of any device.
        state: the checkpoint; of its numbers only shape and type matter.
        complete: whether it must hold all of the network's parameters.

    Returns:
        Tensors that the network does not have, or has in another shape or kind; or else missing ones.
    """
    expected = network.state_dict()
    found = []
    for name, tensor in state.items():
        ours = expected.get(name)
        if ours is None:
            found.append(f"{name} is {tuple(tensor.shape)} in the files, absent in the network")
        elif ours.shape != tensor.shape:
            found.append(f"{name} is {tuple(tensor.shape)} in the files, {tuple(ours.shape)} in the network")
        elif ours.is_floating_point() != tensor.is_floating_point():
            found.append(f"{name} is {tensor.dtype} in the files, {ours.dtype} in the network")
    missing = [name for name, _ in network.named_parameters() if name not in state]
    if complete and missing and not found:
        found.append(
            f"the files lack {len(missing)} parameters of the network, such as {missing[0]}; "
            f"the rest of the network would be random (network.pretrained is false)"
        )
    return found
