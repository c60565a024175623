"""The memory that fitting a generator and sampling from it need, found without images, weights, a GPU, or that memory.

The real modules, losses and optimisers run on fake tensors, which have shapes and no data, and every allocation is
counted: the peak is not an estimate. What libraries allocate for themselves comes on top (cuDNN's workspaces,
blocks that an allocator caches); a GPU's tools show that, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_flatten

from pdiff.errors import UserError
from pdiff.experiment import source
from pdiff.experiment.allocations import bytes_of, counted
from pdiff.experiment.limits import bounds, in_bytes, largest_latent
from pdiff.experiment.schema import Experiment
from pdiff.files import SCRATCH_BYTES
from pdiff.method import diffusion
from pdiff.method.autoencoders import ConvAutoencoderOptions, PCAOptions, convolutional
from pdiff.method.autoencoders.pca import PCA
from pdiff.method.collection import generated_numbers, heldout_split
from pdiff.method.generators import LatentDiffusionOptions
from pdiff.method.generators.latent_diffusion import ENCODED
from pdiff.method.options import resolve
from pdiff.method.training import Best, Trainer, shuffled_rows
from pdiff.method.vectors import IN_MEMORY, block_length
from pdiff.networks import datasets
from pdiff.networks.architectures import build
from pdiff.networks.imported.zoo import Checkpoint
from pdiff.networks.patterns import matching
from pdiff.networks.populations import generated_size

FIT, FLOAT32, BFLOAT16 = "fit", "train, float32", "train, bfloat16"  # on the CPU; on the CPU; on a GPU
COUNTABLE = 2**58  # bytes: the sums of several such parts still fit into 64 bits
STEPS = 2  # from the second on, a step also holds the gradients of the one before it and the state of the optimiser


class Sizes(NamedTuple):
    """What memory depends on: D, L, and the numbers of checkpoints that are used, fitted, and held out."""

    size: int
    latent_size: int
    checkpoints: int
    fitted: int
    heldout: int


class Need(NamedTuple):
    """What a part of the generator holds in memory at its peak, in bytes.

    Attributes:
        part: autoencoder or denoiser.
        does: what it is doing.
        rows: vectors or latents at a time.
        parameters: how many numbers are learned.
        weights: parameters and buffers.
        gradients: of the parameters.
        optimizer: the optimiser's state.
        copies: the averaged weights, and the best ones so far.
        data: the part of the collection that stays in memory.
        activations: saved for the backward pass, or temporary: the rest of the peak. Where the peak comes before all
            gradients exist, they are counted nevertheless, and these are fewer by as much.
    """

    part: str
    does: str
    rows: int
    parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    data: int = 0
    activations: int = 0

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.kinds().values())

    def kinds(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return dict(list(self._asdict().items())[4:])


def sizes(experiment: Experiment) -> Sizes:
    """The sizes of an experiment, with the largest latent size that an automatic PCA can choose.

    Raises:
        UserError: a generator or an autoencoder of another kind; a data set whose classes or image size are known only
            once it is read; an unreadable source.
    """
    options = experiment.generator_options
    if not isinstance(options, LatentDiffusionOptions):
        raise UserError(f"generator.kind {experiment.generator.kind}: memory is predicted for latent_diffusion only")
    if not isinstance(options.autoencoder, PCAOptions | ConvAutoencoderOptions):
        raise UserError(f"autoencoder.kind {experiment.autoencoder.kind}: memory is predicted for pca and conv only")
    settings = experiment.prepare
    files = source.checkpoints(settings) if settings.source else []
    size = _imported(experiment, files[0]) if files else _generated(experiment)
    originals, _ = heldout_split(len(files) or settings.collect.total, settings.heldout, seed=0)
    used = min(experiment.generator.checkpoints or len(originals), len(originals))
    fitted, held = heldout_split(used, experiment.diffusion.heldout_fraction, seed=0)
    return latent_sizes(experiment, size, len(fitted), len(held))


def latent_sizes(experiment: Experiment, size: int, fitted: int, heldout: int) -> Sizes:
    """The sizes that follow from D and the split of the checkpoints."""
    return Sizes(size, largest_latent(experiment, size, fitted), fitted + heldout, fitted, heldout)


def _imported(experiment: Experiment, checkpoint: Checkpoint) -> int:
    """D of the network in a checkpoint."""
    state = checkpoint.read().state
    return generated_numbers({name: state[name] for name in matching(state, experiment.prepare.parameters)})


def _generated(experiment: Experiment) -> int:
    """D of a network on the meta device, which has shapes and no data."""
    facts = datasets.known_sizes(experiment.dataset)
    for name, value in facts.items():
        if not value:
            raise UserError(f"dataset {experiment.dataset.name}: its {name} is not known before its images are read")
    with torch.device("meta"):
        network = build(experiment.network.architecture, pretrained=False, **facts)
    return generated_size(network, experiment.prepare.parameters)


def needs(experiment: Experiment, sizes: Sizes) -> list[Need]:
    """What each phase of each part needs; training in float32, and in bfloat16 autocast as on CUDA.

    Raises:
        UserError: sizes whose bytes PyTorch cannot count.
    """
    for bound in bounds(experiment, sizes.size, "cpu"):
        if bound.memory > COUNTABLE and (bound.stage == "train" or bound.keys == "generate.batch_size"):
            raise UserError(
                f"{bound.keys.replace(' ', ', ')}: at least {in_bytes(bound.memory)}, too much to be counted"
            )
    options = experiment.generator_options
    trained = options.diffusion.steps > 0
    return [*_autoencoder(experiment, options, sizes), *(_denoiser(experiment, options, sizes) if trained else [])]


def _autoencoder(experiment: Experiment, options: LatentDiffusionOptions, sizes: Sizes) -> list[Need]:
    """Fit, encode and decode."""
    kind = resolve(options.autoencoder.module)
    if kind is PCA:
        return [
            pca_fit(sizes),
            _pca("encode", PCA.encode, min(ENCODED, sizes.checkpoints), sizes),
            _pca("decode", PCA.decode, _sampled(experiment), sizes),
        ]
    short = options.autoencoder.model_copy(update={"steps": STEPS})
    make = partial(short.build, sizes.size)
    train = partial(convolutional.trainer, options=short, seed=0)
    encoded = min(ENCODED, sizes.checkpoints)
    return [
        *_fits("autoencoder", make, train, (sizes.fitted, sizes.size), short.batch_size),
        inference("autoencoder", "encode", make, kind.encode, (encoded, sizes.size)),
        inference("autoencoder", "decode", make, kind.decode, (_sampled(experiment), sizes.latent_size)),
    ]


def _pca(does: str, call: Callable, rows: int, sizes: Sizes) -> Need:
    """What a PCA needs to encode or decode some vectors: many of them are computed in blocks of columns."""
    size, width = sizes.size, sizes.size
    if 4 * rows * size > IN_MEMORY:
        width = block_length(size, bytes_each=8 * rows)
    inputs = width if does == "encode" else sizes.latent_size
    need = inference("autoencoder", does, partial(PCA, width, sizes.latent_size), call, (rows, inputs))
    return need._replace(parameters=(sizes.latent_size + 1) * size)


def _denoiser(experiment: Experiment, options: LatentDiffusionOptions, sizes: Sizes) -> list[Need]:
    """Fit, evaluate on the held-out checkpoints, sample."""
    short, length = options.diffusion.model_copy(update={"steps": STEPS}), sizes.latent_size
    make = partial(options.denoiser.build, length)
    train = partial(diffusion.trainer, objective=options.objective, options=short, seed=0)
    shape, best = (sizes.checkpoints - sizes.heldout, length), short.stop_on != "none"
    fits = _fits("denoiser", make, train, shape, short.batch_size, best=best)
    if sizes.heldout:
        heldout = partial(diffusion.heldout_loss, options.objective)
        fits.append(inference("denoiser", "held-out loss", make, heldout, (sizes.heldout, length)))
    return [*fits, inference("denoiser", "sample", make, predict, (_sampled(experiment), length))]


def predict(denoiser: nn.Module, z: Tensor) -> Tensor:
    """A denoiser's prediction from latents (B, L)."""
    return denoiser(z, torch.zeros(len(z)))


def _sampled(experiment: Experiment) -> int:
    return min(experiment.generate.batch_size, experiment.generate.count)


def _fits(part: str, *arguments: Any, **options: Any) -> list[Need]:
    """Training in both precisions."""
    return [training(part, *arguments, **options, bfloat16=bfloat16) for bfloat16 in (False, True)]


def training(
    part: str,
    make: Callable[[], nn.Module],
    train: Callable[..., Trainer],
    shape: tuple[int, int],
    batch_size: int,
    *,
    best: bool = False,
    bfloat16: bool = False,
) -> Need:
    """The peak of training.

    Args:
        part: what is trained.
        make: builds the module.
        train: builds its trainer, given the module and `batches`.
        shape: of the data, (N, numbers).
        batch_size: rows of a batch.
        best: whether a copy of the best weights so far is kept.
        bfloat16: compute the loss under autocast, as on CUDA; autocast on a CPU treats these modules alike.
    """
    with counted() as allocations:
        data, kept = torch.zeros(shape), Best()
        trainer = train(make().train(), batches=shuffled_rows(data, batch_size, 0))
        rows = len(next(trainer.batches(0)))
        trainer.loss = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)(trainer.loss)
        for step in trainer:
            if best:
                kept.update(step.number, trainer.averaged)
    parameters = list(trainer.module.parameters())
    held = {
        "weights": bytes_of(trainer.module.state_dict().values()),
        "gradients": bytes_of(parameter.grad for parameter in parameters),
        "optimizer": bytes_of(tree_flatten(list(trainer.optimizer.state.values()))[0]),
        "copies": bytes_of([*kept.state.values(), *(trainer.ema.state_dict().values() if trainer.ema else ())]),
        "data": bytes_of([data]),
    }
    return Need(
        part,
        BFLOAT16 if bfloat16 else FLOAT32,
        rows,
        _numbers(trainer.module),
        **held,
        activations=allocations.peak - sum(held.values()),
    )


def inference(part: str, does: str, make: Callable[[], nn.Module], call: Callable, shape: tuple[int, int]) -> Need:
    """The peak of one call of a module with rows of a shape, up to the first operation that depends on values."""
    with counted() as allocations, torch.no_grad():
        module = make().eval()
        with suppress(DataDependentOutputException):
            call(module, torch.zeros(shape))
    weights = bytes_of(module.state_dict().values())
    return Need(part, does, shape[0], _numbers(module), weights, activations=allocations.peak - weights)


def pca_fit(sizes: Sizes) -> Need:
    """The peak of `PCA.fit`, of main memory: the matrix and its eigenvectors, and a block of centred vectors, in
    float64 after float32, or with the components of its columns."""
    shape = (sizes.fitted, sizes.size)
    wide = sizes.size >= sizes.fitted
    length = block_length(max(shape), bytes_each=8 * min(shape))
    components = 8 * sizes.latent_size * length if wide else 0
    block = max(12 * length * min(shape), 8 * length * min(shape) + components)
    stored = [4 * sizes.size, 4 * sizes.latent_size * sizes.size]  # center and components
    weights = sum(stored) if stored[1] < SCRATCH_BYTES else stored[0]  # what is mapped to a file needs no memory
    data = 4 * sizes.fitted * sizes.size
    data, working = data if data <= IN_MEMORY else 0, 2 * 8 * min(shape) ** 2 + block
    return Need("autoencoder", FIT, sizes.fitted, sum(stored) // 4, weights, data=data, activations=working)


def _numbers(module: nn.Module) -> int:
    """How many numbers a module learns: its parameters, or the buffers of one that has none, as a PCA."""
    return sum(tensor.numel() for tensor in (list(module.parameters()) or module.buffers()))


def heading(experiment: Experiment, sizes: Sizes) -> str:
    """What the needs are of: the numbers that are generated, the checkpoints, the latents."""
    settings = experiment.autoencoder
    least = "at most " if settings.kind == "pca" and settings.latent_size == "auto" else ""
    known = f" (pca: as many as explain {settings.variance:.2%} of the variance, known after the fit)" if least else ""
    return (
        f"{experiment.tag}: {sizes.size} numbers are generated, from {sizes.checkpoints} checkpoints, "
        f"{sizes.heldout} of them held out; {least}{sizes.latent_size} latents{known}"
    )


def table(found: Iterable[Need]) -> pd.DataFrame:
    """One row for each need, as text; memory in MB (2^20 bytes)."""
    rows = []
    for need in found:
        megabytes = {name: value / 2**20 for name, value in {**need.kinds(), "peak": need.peak}.items()}
        cells = {name: f"{value:,.1f}" if value else "–" for name, value in megabytes.items()}
        rows.append({**need._asdict(), "parameters": f"{need.parameters:,}", **cells})
    return pd.DataFrame(rows)


def peaks(found: Sequence[Need]) -> list[str]:
    """What needs the most on either kind of device, and the largest part of it."""
    lines = []
    for device, left_out in {"CPU": (BFLOAT16,), "GPU": (FLOAT32, FIT)}.items():
        need = max((need for need in found if need.does not in left_out), key=lambda need: need.peak)
        kind, most = max(need.kinds().items(), key=lambda item: item[1])
        part = f"{need.part}, {need.does}; {most / need.peak:.0%} of it {kind}"
        lines.append(f"peak on a {device}  {need.peak / 2**20:,.0f} MB: {part}")
    return lines
