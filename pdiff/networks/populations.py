"""Populations of checkpoints: steps of one run, networks from independent seeds, or branches of one trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.errors import UserError
from pdiff.method.collection import Collection, generated_numbers
from pdiff.method.log import Log, Point
from pdiff.method.training import Best, Trainer, follow
from pdiff.networks.images import Batch, Images, Part
from pdiff.networks.options import Pretrain, TrajectoryOptions
from pdiff.networks.patterns import EVERYTHING, matching
from pdiff.networks.runs import Snapshots
from pdiff.networks.split import split
from pdiff.parallel import ranks

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # buffers that normalisation layers measure


def generated_names(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the generated tensors of a network in state-dict order: all, or those that match a name or a pattern.

    Raises:
        UserError: a pattern matches nothing.
    """
    state = network.state_dict()
    for pattern in () if tuple(patterns) == EVERYTHING else patterns:
        if not matching(state, [pattern]):
            raise UserError(
                f"prepare.parameters: {pattern!r} matches none of the network's {len(state)} tensors, "
                f"such as {', '.join(list(state)[-4:])}"
            )
    return matching(state, patterns)


def generated_size(network: nn.Module, patterns: Sequence[str]) -> int:
    """How many numbers of a network are generated."""
    state = network.state_dict()
    return generated_numbers({name: state[name] for name in generated_names(network, patterns)})


def pretrain(
    network: nn.Module,
    images: Images,
    settings: Pretrain,
    *,
    seed: int,
    accuracy: Callable[[nn.Module], float],
    log: Log,
    path: Path | None = None,
) -> None:
    """Train a network in place; the weights of the epoch with the best validation accuracy are kept.

    Args:
        network: on its device.
        images: data set; its training part is used.
        settings: epochs, optimiser, batch size.
        seed: of the order of the images, and of augmentation.
        accuracy: network -> validation accuracy.
        log: receives `pretrain/loss` and `pretrain/val_accuracy`.
        path: file of the training state, from which an interrupted training continues.
    """
    if not settings.epochs:
        return
    per_epoch = max(1, len(images.train) // settings.batch_size)
    trainer = Trainer(
        network.train(),
        lambda batch: F.cross_entropy(network(batch[0]), batch[1]),
        _training_batches(images.train, settings.batch_size, seed, next(network.parameters()).device),
        settings,
        steps=per_epoch * settings.epochs,
        seed=seed,
        autocast=True,
    )
    best = Best()
    for step in follow(trainer, "pretrain/loss", log, path=path, beside=(best,)):
        if step.number % per_epoch == 0:
            value = accuracy(network)
            best.update(value, network)
            log(Point("pretrain/val_accuracy", value, step.number))
    best.restore(network)


def collect(
    network: nn.Module,
    images: Images,
    settings: TrajectoryOptions,
    names: Sequence[str],
    *,
    seed: int,
    log: Log,
    path: Path | None = None,
) -> Collection:
    """Fine-tune the generated parameters alone, and take a checkpoint of them every few steps until there are enough.

    All other parameters are frozen. The part of the network that does not depend on generated ones (see `split`) is
    computed without gradients. Normalisation layers use their stored statistics; those whose statistics are generated
    measure the batches, and then the network is not split.

    Args:
        network: pretrained, on its device; left in the state of the last step.
        images: data set; its training part is used.
        settings: number of checkpoints, steps between them (`auto`: they are spread over one epoch), optimiser.
        names: generated tensors of the state dict.
        seed: of the order of the images, and of augmentation.
        log: receives `collect/loss`.
        path: file of the training state, from which an interrupted collection continues.

    Raises:
        UserError: `names` are buffers only.
    """
    measuring = _only_trains(network, names)
    prefix, suffix = ((lambda batch: (batch,)), network) if measuring else split(network, names)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            activations = prefix(batch[0])
        return F.cross_entropy(suffix(*activations), batch[1])

    automatic = max(1, len(images.train) // settings.batch_size // settings.checkpoints)
    every = automatic if settings.every_steps == "auto" else settings.every_steps
    trainer = Trainer(
        network,
        loss,
        _training_batches(images.train, settings.batch_size, seed, next(network.parameters()).device),
        settings,
        steps=settings.checkpoints * every,
        seed=seed,
        autocast=True,
    )
    collected = Snapshots()
    for step in follow(trainer, "collect/loss", log, path=path, beside=(collected,)):
        if step.number % every == 0:
            state = network.state_dict()
            collected.states.append({name: state[name].detach().cpu().clone() for name in names})
    return Collection.stack(collected.states)


def branches(trunk: nn.Module, names: Sequence[str]) -> Callable[[int], nn.Module]:
    """k -> branch k of a pretrained network, the trunk: a copy, of which the generated tensors alone are trained on.

    Networks that go on from one trunk differ, and can yet be averaged (linear mode connectivity: Frankle et al. 2020,
    arXiv 1912.05671).

    Raises:
        UserError: `names` are buffers only.
    """
    _only_trains(trunk, names)
    return lambda k: deepcopy(trunk)


def _only_trains(network: nn.Module, names: Sequence[str]) -> bool:
    """Freeze everything but some tensors, and let the normalisation layers whose statistics are among them measure.

    Returns:
        Whether there are such layers.

    Raises:
        UserError: `names` are buffers only.
    """
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"prepare.parameters {', '.join(names)}: buffers alone cannot be fine-tuned")
    measuring = {name.rpartition(".")[0] for name in names if name.endswith(STATISTICS)}
    network.eval()
    for name in measuring:
        network.get_submodule(name).train()
    return bool(measuring)


def _training_batches(images: Part, size: int, seed: int, device: torch.device) -> Callable[[int], Iterator[Batch]]:
    """First batch -> endless shuffled batches; of each, the rows of this process."""
    rows = ranks.rows()
    return lambda start: images.stream(size, seed=seed, start=start, device=device, rows=rows)
