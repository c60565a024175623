"""The training loop of networks, autoencoders and denoisers: a `Trainer` yields every step; callers log, stop, collect.

`resumable` and `follow` wrap it: an interrupted training resumes from its file and ends with the same weights.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from pdiff import compat
from pdiff.errors import Damaged
from pdiff.files import write_state
from pdiff.method.log import Log, Point
from pdiff.method.options import Optimization
from pdiff.parallel import ranks, training
from pdiff.seeds import stream

SAVE_SECONDS = float(os.environ.get("PDIFF_SAVE_SECONDS", "5"))  # between two saved states; tests shorten it
SAVE_SHARE = 0.05  # at most this share of the time goes into saving
LOGGED_POINTS = 200  # points of a loss curve
Batches = Callable[[int], Iterator[Any]]  # step -> endless batches from that step on; of each, this process's rows


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is the current GPU where there is one, else the CPU.

    Raises:
        ValueError: a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    devices = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= devices.get(device.type, 0):
        raise ValueError(f"device: {name!r} is not on this machine, expected auto or cpu")
    return device


class Step(NamedTuple):
    """One optimiser step done: how many are done, and its loss (a scalar on the device, detached).

    The mean of the losses of all processes is that of the batch.
    """

    number: int
    loss: Tensor


class Stateful(Protocol):
    """What can be saved beside a trainer."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def shuffled(count: int, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless shuffled batches of indices below `count`, from batch `start` on; partial batches are dropped.

    Where there are fewer indices than a batch holds, each batch consists of as many shuffles as fill it. Batch k
    depends on (seed, k) alone, so an interrupted loop meets the same batches again.
    """
    return (rows[0] for rows in shuffled_each(count, batch_size, seeds=[seed], start=start))


def shuffled_each(count: int, batch_size: int, *, seeds: Sequence[int], start: int = 0) -> Iterator[Tensor]:
    """The batches of `shuffled` for several seeds at once, (seeds, batch_size)."""
    shuffles = max(1, -(-batch_size // count))
    per_epoch = shuffles * count // batch_size
    epoch, skip = divmod(start, per_epoch)
    while True:
        orders = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(stream(seed, epoch))
            orders.append(torch.cat([torch.randperm(count, generator=generator) for _ in range(shuffles)]))
        yield from torch.stack(orders).split(batch_size, dim=1)[skip:per_epoch]
        epoch, skip = epoch + 1, 0


def shuffled_rows(x: Tensor, batch_size: int, seed: int) -> Batches:
    """Endless shuffled batches of the rows of a tensor; of each, those of this process."""
    rows = ranks.rows()
    return lambda start: (x[i[rows].to(x.device)] for i in shuffled(len(x), batch_size, seed=seed, start=start))


def seed_generators(kind: str, seed: int) -> None:
    """Seed the generators of the CPU and of a kind of device.

    `torch.manual_seed` does it for every backend, which costs more than a small step where CUDA is not initialised.
    """
    torch.default_generator.manual_seed(seed)
    if kind == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif kind == "mps":
        torch.mps.manual_seed(seed)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Optimization) -> torch.optim.Optimizer:
    """The optimiser that the settings name; it updates all parameters in one kernel where the device has one."""
    parameters = list(parameters)
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    options |= compat.fused(parameters[0].device.type)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **options)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    return kinds[settings.optimizer](parameters, **options)


def make_schedule(optimizer: torch.optim.Optimizer, settings: Optimization, steps: int) -> Any:
    """The learning-rate schedule that the settings name, over `steps` steps."""
    schedulers = torch.optim.lr_scheduler
    if settings.schedule == "one_cycle":
        return schedulers.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps + 1)
    if settings.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, steps, eta_min=settings.final_learning_rate)
    return schedulers.ConstantLR(optimizer, factor=1.0)


class Trainer:
    """Optimiser steps of a module; iterating it takes them one by one.

    The randomness of step k depends on (seed, k) alone: batches, noise and dropout are the same after a resume.

    Args:
        module: what is trained; its parameters that require gradients.
        loss: batch -> scalar, the mean over its rows.
        batches: of what the loss takes; of each, this process's rows.
        settings: optimiser and schedule.
        steps: steps in all.
        seed: of the whole training.
        ema: decay of the exponential moving average of the weights, 0 for none.
        autocast: compute the loss in bfloat16 on GPUs of CUDA that can.
        shared: several processes share every batch; otherwise each trains a separate module.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any], Tensor],
        batches: Batches,
        settings: Optimization,
        *,
        steps: int,
        seed: int,
        ema: float = 0.0,
        autocast: bool = False,
        shared: bool = True,
    ) -> None:
        self.module, self.loss, self.batches, self.steps, self.seed = module, loss, batches, steps, seed
        self.optimizer = make_optimizer((p for p in module.parameters() if p.requires_grad), settings)
        self.schedule = make_schedule(self.optimizer, settings, steps)
        self.ema = AveragedModel(module, **compat.ema(ema), use_buffers=True) if ema else None
        self.autocast, self.shared = autocast, shared
        self.batch_size = settings.batch_size
        self.step = 0

    @property
    def averaged(self) -> nn.Module:
        """The module whose weights are averaged, or the module itself."""
        return self.ema.module if self.ema else self.module

    def __iter__(self) -> Iterator[Step]:
        kind = next(self.module.parameters()).device.type
        autocast = self.autocast and kind == "cuda" and torch.cuda.is_bf16_supported()
        batches = self.batches(self.step)
        objective = self.loss
        if self.shared:
            objective = training.shared(self.module, lambda batch: self.loss(batch), self.batch_size)
        while self.step < self.steps:
            seed_generators(kind, stream(self.seed, self.step))
            self.optimizer.zero_grad()  # before the activations need memory
            with torch.autocast(kind, torch.bfloat16) if autocast else nullcontext():
                loss = objective(next(batches))
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            if self.ema:
                self.ema.update_parameters(self.module)
            self.step += 1
            yield Step(self.step, loss.detach())

    def _parts(self) -> dict[str, Stateful]:
        parts = {"module": self.module, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts | ({"ema": self.ema} if self.ema else {})

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return {"step": self.step} | state | {"schedule": compat.plain_state(state["schedule"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved step."""
        self.step = state["step"]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


class Best:
    """The best state of a module so far, by a score: higher is better.

    Attributes:
        score: the best score, the mean over all processes.
        since_best: updates since then, none of which was better.
        state: the state dict of the module at the best score.
    """

    def __init__(self) -> None:
        self.score, self.since_best, self.state = -math.inf, 0, {}

    def update(self, score: float, module: nn.Module) -> bool:
        """Whether the module as it is now is the best so far, by its score; the same on all processes."""
        score = ranks.mean(score)
        if not score > self.score:
            self.since_best += 1
            return False
        self.score, self.since_best = score, 0
        self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        return True

    def restore(self, module: nn.Module) -> None:
        """Put the best state back, if there was one."""
        if self.state:
            module.load_state_dict(self.state)

    def state_dict(self) -> dict[str, Any]:
        """Score, misses and the best state."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        vars(self).update(state)


def resumable(trainer: Trainer, path: Path | None, *beside: Stateful) -> Iterator[Step]:
    """The trainer's steps after the last one that is saved in `path`, where its state and that of `beside` are kept.

    A state is saved every few seconds, after the caller has dealt with the step, so that what it keeps in `beside`
    belongs to that step.

    Raises:
        Damaged: `path` cannot be read, or is the state of another training.
    """
    parts = (trainer, *beside)
    if path and path.exists():
        try:
            states = torch.load(path, map_location="cpu", weights_only=True)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        except Exception as error:  # a damaged file may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise Damaged(path, f"not a state that this training can resume from ({reason})") from error
    saved, pause = time.monotonic(), SAVE_SECONDS
    for step in trainer:
        yield step
        if path and (time.monotonic() - saved > pause or step.number == trainer.steps):
            begin = time.monotonic()
            write_state(path, [part.state_dict() for part in parts])
            saved = time.monotonic()
            pause = max(SAVE_SECONDS, (saved - begin) / SAVE_SHARE)


def follow(trainer: Trainer, name: str, log: Log, *, path: Path | None = None, beside: tuple = ()) -> Iterator[Step]:
    """Resumable steps with a progress bar, whose losses are logged under `name`.

    Raises:
        ValueError: the loss is no longer finite.
    """
    every = max(1, trainer.steps // LOGGED_POINTS)
    steps = resumable(trainer, path, *beside)
    with tqdm(total=trainer.steps, desc=name.split("/")[0], unit="step", dynamic_ncols=True, disable=None) as bar:
        for step in steps:
            bar.update(step.number - bar.n)
            if step.number % every == 0 or step.number == trainer.steps:
                value = ranks.mean(step.loss.item())
                if not math.isfinite(value):
                    raise ValueError(
                        f"{name} is {value} at step {step.number}: training diverged; a lower learning_rate may help"
                    )
                log(Point(name, value, step.number))
                bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            yield step
