"""Many trainings of one architecture: side by side, with their weights stacked, or one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from pdiff.files import read_json, write_json
from pdiff.method.collection import Collection
from pdiff.method.log import Log, Point
from pdiff.method.training import Trainer, resumable, shuffled_each
from pdiff.networks.images import Batch, TrainingPart
from pdiff.networks.options import RunsOptions
from pdiff.parallel import ranks
from pdiff.seeds import stream

STACKED_NUMBERS = {"cpu": 300_000, "cuda": 50_000_000}  # of the networks trained side by side: on a CPU, a cache full
IN_MEMORY_BYTES = 1 << 30  # of preprocessed images that networks trained side by side read from
MEASURED_STEPS = 4  # of both ways, of which the fastest counts


class Stack(nn.Module):
    """Networks of one architecture as one module, their tensors stacked along a first dimension.

    Optimisers that treat each number by itself, as SGD, Adam and AdamW do, train every network as if it were alone,
    where the loss is the sum of the networks' losses.

    Args:
        networks: n of them, in one mode, of the same parameters that require gradients.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = len(networks)
        self.template = (networks[0],)  # in a tuple, or its parameters would be trained, too
        trained = {name for name, parameter in networks[0].named_parameters() if parameter.requires_grad}
        states = [{**dict(network.named_parameters()), **dict(network.named_buffers())} for network in networks]
        for k, name in enumerate(states[0]):
            rows = torch.stack([state[name].detach() for state in states])
            if name in trained:
                self.register_parameter(f"_{k}", nn.Parameter(rows))  # its own name may have dots
            else:
                self.register_buffer(f"_{k}", rows)
        self.names = tuple(states[0])

    def tensors(self) -> dict[str, Tensor]:
        """Name -> (n, *shape), of all parameters and buffers."""
        return {name: getattr(self, f"_{k}") for k, name in enumerate(self.names)}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, B, classes) of a batch of images for each network, (n, B, channels, height, width)."""
        (network,), tensors = self.template, self.tensors()
        if self.networks == 1:
            return functional_call(network, {name: rows[0] for name, rows in tensors.items()}, (images[0],))[None]
        return vmap(lambda state, batch: functional_call(network, state, (batch,)))(tensors, images)


class Trained(NamedTuple):
    """Networks of several trainings.

    Attributes:
        collection: their checkpoints, those of one training one after the other.
        columns: what is known of each checkpoint: `network`, `seed` and `step`, one value each.
    """

    collection: Collection
    columns: dict[str, list[int]]


def train_all(
    make: Callable[[int], nn.Module],
    part: TrainingPart,
    settings: RunsOptions,
    names: Sequence[str],
    *,
    seed: int,
    device: torch.device | str,
    log: Log,
    folder: Path,
) -> Trained:
    """Train many networks, each with a separate order of batches.

    Network k depends on (seed, k) alone: not on how many there are, nor, but for rounding, on those trained beside it.
    Small networks are trained side by side, where that is faster; processes share the networks.

    Args:
        make: k -> network k, untrained, in the mode in which it is trained; what is trained requires gradients.
        part: training images.
        settings: how many, for how long, optimiser.
        names: tensors of the state dict that are collected.
        seed: of all trainings.
        device: where to compute.
        log: receives `collect/loss`, the mean loss of the last step, when some networks are finished.
        folder: of finished networks and of the state of those in training, from which an interrupted call continues.

    Raises:
        ValueError: a loss is no longer finite.
    """
    steps = settings.steps or settings.epochs * max(1, len(part) // settings.batch_size)
    seeds = [stream(seed, k) for k in range(settings.networks)]
    snapshots = [-(-steps * (j + 1) // settings.snapshots) for j in range(settings.snapshots)]
    context = _Trainings(make, part, settings, steps, seeds, torch.device(device))
    size = context.side_by_side(folder)
    parts = []
    with tqdm(total=settings.networks, desc="collect", unit="network", dynamic_ncols=True, disable=None) as bar:
        for chunk in torch.arange(settings.networks).split(size * ranks.world()):
            path = folder / f"{chunk[0]}_{chunk[-1] + 1}.safetensors"
            if not path.exists():
                state = path.with_suffix(".pt")
                tensors, loss = context.train(chunk.tolist(), snapshots, names, state if ranks.world() == 1 else None)
                Collection(tensors).save(path)
                state.unlink(missing_ok=True)
                log(Point("collect/loss", loss, int(chunk[-1]) + 1))
            parts.append(path)
            bar.update(len(chunk))
    rows = [(k, seeds[k], step) for k in range(settings.networks) for step in snapshots]
    label = "{:05d}_{:05d}" if len(snapshots) > 1 else "{:05d}"
    ranks.summed(0.0)  # rank 0 has written all files
    collection = Collection.concatenate([Collection.load(path) for path in parts])
    collection.names = [label.format(k, step) for k, _, step in rows]
    return Trained(collection, dict(zip(("network", "seed", "step"), map(list, zip(*rows, strict=True)), strict=True)))


class _Trainings(NamedTuple):
    """What all trainings share."""

    make: Callable[[int], nn.Module]
    part: TrainingPart
    settings: RunsOptions
    steps: int
    seeds: list[int]
    device: torch.device

    def trainer(self, networks: Sequence[int]) -> Trainer:
        """The training of some networks side by side; its loss is the sum of theirs."""
        stack = Stack([self.made(k) for k in networks]).to(self.device)

        def loss(batch: Batch) -> Tensor:
            images, labels = batch
            logits = stack(images)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]

        seed = stream(self.seeds[networks[0]], "train")  # of dropout, which networks alone in their stack may have
        options = {"steps": self.steps, "seed": seed, "autocast": True, "shared": False}
        return Trainer(stack, loss, lambda start: self.batches(networks, start), self.settings, **options)

    def made(self, k: int) -> nn.Module:
        """Network k, untrained."""
        torch.manual_seed(stream(self.seeds[k], "init"))
        return self.make(k)

    def batches(self, networks: Sequence[int], start: int) -> Iterator[Batch]:
        """Endless batches of every network: images (n, B, ...) and labels (n, B)."""
        size = self.settings.batch_size
        seeds = [stream(self.seeds[k], "batches") for k in networks]
        if len(networks) == 1:
            for images, labels in self.part.stream(size, seed=seeds[0], start=start, device=self.device):
                yield images[None], labels[None]
            return
        everything = list(self.part.batches(size, self.device))
        images, labels = (torch.cat(tensors) for tensors in zip(*everything, strict=True))
        for rows in shuffled_each(len(labels), size, seeds=seeds, start=start):
            index = rows.to(self.device)
            yield images[index], labels[index]

    def train(
        self, networks: Sequence[int], snapshots: Sequence[int], names: Sequence[str], path: Path | None
    ) -> tuple[dict[str, Tensor], float]:
        """Train some networks, of which each process takes its part.

        Returns:
            The tensors of their checkpoints, (n * snapshots, *shape), and the mean loss of the last step.

        Raises:
            ValueError: the loss is no longer finite.
        """
        mine = networks[ranks.rows()]
        trainer, taken = self.trainer(mine or networks[:1]), Snapshots()
        for step in resumable(trainer, path, taken):
            if step.number in snapshots:
                tensors = trainer.module.tensors()
                taken.states.append({name: tensors[name].detach().cpu().clone() for name in names})
        loss = step.loss.item() / max(1, len(mine))
        if not loss < float("inf"):
            raise ValueError(f"collect/loss is {loss}: training diverged; a lower learning_rate may help")
        found = {}
        for name in names:
            rows = torch.stack([state[name] for state in taken.states], dim=1)[: len(mine)]  # (n, snapshots, *shape)
            found[name] = ranks.gathered(rows.contiguous(), len(networks)).flatten(0, 1)
        return found, ranks.mean(loss)

    def side_by_side(self, folder: Path) -> int:
        """How many networks a process trains together; measured once, since the two ways differ by rounding."""
        path = folder / "plan.json"
        if not path.exists():
            write_json(path, {"side_by_side": self._measured()})
        ranks.summed(0.0)
        return read_json(path)["side_by_side"]

    def _measured(self) -> int:
        network = self.make(0)
        numbers = sum(parameter.numel() for parameter in network.parameters())
        most = STACKED_NUMBERS.get(self.device.type, STACKED_NUMBERS["cpu"]) // max(1, numbers)
        count = min(most, -(-self.settings.networks // ranks.world()))
        image = next(self.part.batches(1))[0]
        normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        in_memory = not self.part.crop and image.numel() * image.element_size() * len(self.part) <= IN_MEMORY_BYTES
        if count < 2 or normalised or not in_memory or ranks.rank() > 0:
            return 1
        try:
            alone, together = (self._seconds(n) for n in (1, count))
        except RuntimeError:  # vmap cannot batch every operation: random ones, or branches on values
            return 1
        return count if together < alone else 1

    def _seconds(self, count: int) -> float:
        """Seconds of a step, divided by the networks that take it side by side."""
        steps = islice(self.trainer(range(count)), MEASURED_STEPS)
        times = [time.perf_counter(), *(time.perf_counter() for _ in steps)]
        return min(after - before for before, after in pairwise(times)) / count


class Snapshots:
    """The checkpoints of a training so far, saved with the training state."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """All of them."""
        return {"states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.states = state["states"]
