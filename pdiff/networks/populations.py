"""Where checkpoints come from: pretrain a network, then collect N checkpoints of its generated parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.errors import UserError
from pdiff.method.collection import Collection, StateDict, generated_numbers, is_generated, not_finite
from pdiff.method.log import Log, Point
from pdiff.method.training import Best, Trainer, follow
from pdiff.networks.images import Batch, Images, Part
from pdiff.networks.options import Collect, Pretrain
from pdiff.networks.split import split
from pdiff.parallel import ranks

EVERYTHING = ("all",)
IMPLIED = ("running_mean", "running_var", "num_batches_tracked")


def generated_names(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the state dict that are generated, in its order: all, or those that match a name or a pattern.

    Raises:
        UserError: a pattern that matches nothing.
    """
    state = network.state_dict()
    for pattern in () if tuple(patterns) == EVERYTHING else patterns:
        if not any(fnmatchcase(name, pattern) for name in state):
            raise UserError(
                f"prepare.parameters: {pattern!r} matches none of the network's {len(state)} tensors, "
                f"such as {', '.join(list(state)[-4:])}"
            )
    return matching(state, patterns)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names, in their order, that are one of the patterns or match it; every name for "all" alone."""
    everything = tuple(patterns) == EVERYTHING
    return [name for name in names if everything or any(fnmatchcase(name, pattern) for pattern in patterns)]


def generated_size(network: nn.Module, patterns: Sequence[str]) -> int:
    """How many numbers of a network are generated."""
    state = network.state_dict()
    return generated_numbers({name: state[name] for name in generated_names(network, patterns)})


def snapshot(network: nn.Module, names: Sequence[str]) -> StateDict:
    """A copy of some tensors of a network, on the CPU."""
    state = network.state_dict()
    return {name: state[name].detach().cpu().clone() for name in names}


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
    """Train a network in place; the epoch with the best validation accuracy is kept.

    Args:
        network: on its device.
        images: training images.
        settings: epochs, optimiser, batch size.
        seed: of order and augmentation.
        accuracy: validation accuracy of a network.
        log: told the loss and the accuracy.
        path: where the state is saved, to resume.
    """
    if not settings.epochs:
        return
    device = next(network.parameters()).device
    per_epoch = max(1, len(images.train) // settings.batch_size)
    trainer = Trainer(
        network.train(),
        lambda batch: F.cross_entropy(network(batch[0]), batch[1]),
        _batches(images.train, settings.batch_size, seed, device),
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
    settings: Collect,
    names: Sequence[str],
    *,
    seed: int,
    log: Log,
    path: Path | None = None,
) -> Collection:
    """Fine-tune the generated parameters alone, and save them every few steps until there are enough.

    Everything else is frozen, and what does not depend on generated parameters is computed once per batch, without
    gradients. Normalisation layers run on their stored statistics, unless those are generated, too.

    Args:
        network: pretrained, on its device; left at its last step.
        images: training images.
        settings: how many checkpoints, how often (`auto`: so that they take one epoch), optimiser.
        names: tensors of the state dict that are generated.
        seed: of order and augmentation.
        log: told the loss.
        path: where the state is saved, to resume.
    """
    device = next(network.parameters()).device
    automatic = max(1, len(images.train) // settings.batch_size // settings.checkpoints)
    every = automatic if settings.every_steps == "auto" else settings.every_steps
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"prepare.parameters {', '.join(names)}: buffers alone cannot be fine-tuned")
    prefix, suffix = split(network, names)
    moving = _moving(network, names)
    if moving:
        prefix, suffix = (lambda batch: (batch,)), network
        for module in moving:
            module.train()
    trainer = Trainer(
        network,
        lambda batch: F.cross_entropy(_through(prefix, suffix, batch), batch[1]),
        _batches(images.train, settings.batch_size, seed, device),
        settings,
        steps=settings.checkpoints * every,
        seed=seed,
        autocast=True,
    )
    taken = _Taken()
    for step in follow(trainer, "collect/loss", log, path=path, beside=(taken,)):
        if step.number % every == 0:
            taken.states.append(snapshot(network, names))
    return Collection.stack(taken.states)


def _batches(images: Part, size: int, seed: int, device: torch.device) -> Callable[[int], Iterator[Batch]]:
    """Endless shuffled batches of images; of each, the rows of this process."""
    own = ranks.rows()
    return lambda start: images.stream(size, seed=seed, start=start, device=device, rows=own)


def _through(prefix: Callable, suffix: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch; gradients through the suffix alone."""
    with torch.no_grad():
        activations = prefix(batch[0])
    return suffix(*activations)


def _moving(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Normalisation layers whose statistics are generated, which therefore go on measuring them."""
    owners = {name.rpartition(".")[0] for name in names if name.endswith(IMPLIED)}
    return [module for name, module in network.named_modules() if name in owners]


class _Taken:
    """The checkpoints collected so far."""

    def __init__(self) -> None:
        self.states: list[StateDict] = []

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states = state["states"]


def check_state(state: StateDict, where: str, *, like: StateDict, named: str) -> None:
    """Check that a checkpoint has the layout of another one, something to generate, and only finite numbers.

    Args:
        state: tensors of the checkpoint.
        where: what it is called.
        like: the checkpoint whose names, shapes and types are expected.
        named: what that one is called.

    Raises:
        UserError: the first tensor that is wrong.
    """
    if different := sorted(like.keys() ^ state.keys()):
        raise UserError(f"{where}: tensors differ from those of {named}: {', '.join(different[:4])}")
    for name, tensor in state.items():
        expected = like[name]
        if tensor.shape != expected.shape:
            raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(expected.shape)} as in {named}")
        if tensor.dtype != expected.dtype:
            raise UserError(f"{where}: {name} is {tensor.dtype}, expected {expected.dtype} as in {named}")
    if not any(is_generated(name, tensor) for name, tensor in state.items()):
        raise UserError(f"{where}: no floating tensor of more than one element, so nothing can be generated")
    if name := not_finite(state):
        raise UserError(f"{where}: {name} holds NaN or infinity, expected finite numbers")
