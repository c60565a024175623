"""Whether an experiment fits into this machine: lower bounds of its memory and disk, found without torch.

A bound counts only what exists at one time for certain, so what is refused here could not work. Large collections lie
in files, mapped to memory: they need disk, and of memory only what is kept of each network beside its numbers. `pdiff
memory` predicts the peak of a training itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import psutil

from pdiff.errors import UserError
from pdiff.experiment import sizes, source
from pdiff.experiment.schema import Experiment
from pdiff.method.generators import LatentDiffusionOptions
from pdiff.networks.datasets import DATASETS, known_sizes

VECTOR = 4  # bytes of a number of a vector, a latent, a weight that is trained: float32
STORED = 2  # bytes of a number of a checkpoint: float16 is the smallest type that is generated
INDEX = 8  # bytes of an index, or of a reference to a name
LONGEST = 40  # characters of a value in messages
SMALLEST = 2  # numbers that are generated: one alone is not, see `is_generated`


class Bound(NamedTuple):
    """What a stage needs at least, in bytes, and the keys of the configuration that decide it, separated by spaces."""

    stage: str
    keys: str
    memory: int
    disk: int = 0

    def exceeds(self, memory: int, disk: int) -> str:
        """What is needed of memory or disk, and what there is, if that is less; else nothing."""
        if self.memory > memory:
            return f"{in_bytes(self.memory)} of memory, but this machine has {in_bytes(memory)} (RAM and swap)"
        return f"{in_bytes(self.disk)} of disk, but there are {in_bytes(disk)}" if self.disk > disk else ""


def check(
    experiment: Experiment,
    stages: Collection[str],
    folder: Path,
    *,
    size: int | None = None,
    device: str = "",
) -> None:
    """Refuse sizes that this machine cannot hold.

    Memory is compared with all RAM and swap, since what others use now may be free when it is needed.

    Args:
        experiment: its configuration.
        stages: those that would run.
        folder: where they keep what they have.
        size: D, as a stage that begins now knows it; then the disk must have the room at present. Absent: what is known
            of D before anything is read; then the disk must be large enough, as finished stages need no more room.
        device: where it will be trained; that of the configuration when absent.

    Raises:
        UserError: all that does not fit, each with key, value, what would be needed, and what there is.
    """
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    disk = shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()))
    room = disk.total if size is None else disk.free + sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    numbers = (sizes.known(experiment) or SMALLEST) if size is None else size
    problems: dict[str, str] = {}
    for bound in bounds(experiment, numbers, device or experiment.device):
        if bound.stage in stages and (needed := bound.exceeds(memory, room)):
            values = {key: str(reduce(getattr, key.split("."), experiment))[:LONGEST] for key in bound.keys.split()}
            where = ", ".join(f"{key} {value}" for key, value in values.items())
            problems.setdefault(bound.keys, f"{where}: {bound.stage} needs at least {needed}")
    if problems:
        raise UserError("; ".join(problems.values()))


def bounds(experiment: Experiment, size: int, device: str) -> Iterator[Bound]:
    """What each stage needs at least, where `size` numbers are generated, or more."""
    prepare, generate, evaluate = experiment.prepare, experiment.generate, experiment.evaluate
    if prepare.source:
        collected, key = source.count(prepare), "prepare.source"
        yield Bound("prepare", key, INDEX * collected, STORED * collected * size)
    else:
        collected, key = prepare.collect.total, " ".join(f"prepare.collect.{name}" for name in prepare.collect.counts)
        yield Bound("prepare", key, STORED * collected * size, STORED * collected * size)
        yield Bound("prepare", "prepare.collect.batch_size", _images(experiment, prepare.collect.batch_size))
        if prepare.collect.pretrains and prepare.pretrain.epochs:
            yield Bound("pretrain", "prepare.pretrain.batch_size", _images(experiment, prepare.pretrain.batch_size))
    used = experiment.generator.checkpoints or collected
    key = "generator.checkpoints" if experiment.generator.checkpoints else key
    yield Bound("train", key, VECTOR * used)  # a latent of each
    options = experiment.generator_options
    if isinstance(options, LatentDiffusionOptions):
        yield from _latent_diffusion(experiment, options, size, used, device)
    networks = STORED * generate.count * size
    yield Bound("generate", "generate.count", INDEX * generate.count, 2 * networks)  # batch by batch, and together
    yield Bound("generate", "generate.batch_size", VECTOR * min(generate.batch_size, generate.count))
    yield Bound("evaluate", "generate.count", INDEX * generate.count)
    if evaluate.kind == "images":  # similarities of errors
        yield Bound("evaluate", f"{key} generate.count", VECTOR * (used + generate.count) ** 2)
    arms = len(evaluate.noise) + len(evaluate.baselines)
    stage = "audit" if experiment.audit else "evaluate"
    count = arms * evaluate.baseline_count
    yield Bound(stage, "evaluate.baseline_count", INDEX * count, STORED * count * size)


def _latent_diffusion(
    experiment: Experiment, options: LatentDiffusionOptions, size: int, used: int, device: str
) -> Iterator[Bound]:
    """The bounds of autoencoder, denoiser and sampling. A GPU's memory is not known: there the weights alone count,
    which are made in main memory."""
    trained, latents = options.diffusion, getattr(options.autoencoder, "latent_size", "auto")
    latents = 1 if latents == "auto" else largest_latent(experiment, size, used // 2)  # at most half are held out
    copies = getattr(options.autoencoder, "copies", 1) if device == "cpu" else 1
    autoencoder = VECTOR * copies * options.autoencoder.least_parameters(size)
    yield Bound("train", "autoencoder.latent_size", autoencoder)
    if hasattr(options.autoencoder, "batch_size"):
        yield Bound("train", "autoencoder.batch_size", 2 * INDEX * options.autoencoder.batch_size)
    if not trained.steps:
        return
    copies = trained.copies + bool(trained.ema) if device == "cpu" else 1
    denoiser = VECTOR * copies * options.denoiser.least_parameters(latents)
    options_of = (f"diffusion.{name}" for name in type(options.denoiser).model_fields)
    yield Bound("train", " ".join(["autoencoder.latent_size", *options_of]), denoiser)
    yield Bound("train", "diffusion.batch_size", 2 * INDEX * trained.batch_size)  # shuffles, and joined
    path = 2 * VECTOR * options.objective.timesteps  # of noise levels, beside what they are computed from
    for stage in ("train", "generate") if options.objective.path == "ddpm" else ("generate",):
        yield Bound(stage, "diffusion.timesteps", path)


def largest_latent(experiment: Experiment, size: int, fitted: int) -> int:
    """L, at most, of vectors (fitted, size)."""
    settings = experiment.autoencoder
    wanted = size if settings.latent_size == "auto" else settings.latent_size
    return wanted if settings.kind == "conv" else max(1, min(wanted, size, fitted - 1))


def _images(experiment: Experiment, batch_size: int) -> int:
    """Bytes of a batch of images, as they are read, and of their shuffled indices."""
    source, side = DATASETS[experiment.dataset.name], known_sizes(experiment.dataset)["image_size"]
    return batch_size * (2 * INDEX + source.channels * min(source.image_size, side) ** 2)


def in_bytes(count: int) -> str:
    """A number of bytes for people, in powers of 1000."""
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
    power = min(Decimal(count).adjusted() // 3, len(units) - 1)
    return f"{Decimal(count).scaleb(-3 * power):.3g} {units[power]}"
