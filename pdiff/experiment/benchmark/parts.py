"""What the benchmark times: each function prepares one entry of PARTS on random networks of one layout."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

from pdiff.experiment.benchmark import Sizes
from pdiff.experiment.benchmark.measure import Work, forget
from pdiff.method import diffusion
from pdiff.method.alignment.matching import align
from pdiff.method.alignment.symmetries import permutation_groups
from pdiff.method.autoencoders import ConvAutoencoderOptions, convolutional
from pdiff.method.autoencoders.pca import PCA
from pdiff.method.collection import Collection
from pdiff.method.denoisers import ConvDenoiserOptions, DenoiserOptions, MLPDenoiserOptions
from pdiff.method.generators import DiffusionOptions
from pdiff.method.log import ignore
from pdiff.method.novelty import squared_distances
from pdiff.method.objectives import Epsilon, Flow, Objective
from pdiff.method.similarity import wrong_iou
from pdiff.method.training import Trainer, shuffled_rows
from pdiff.networks import datasets
from pdiff.networks.options import Dataset, SeedsOptions
from pdiff.networks.predict import batch_predictions
from pdiff.networks.runs import train_all
from pdiff.networks.small import mlp

HIDDEN, CLASSES = 32, 10
ENDLESS = 10**9  # steps of a training that is timed step by step
PAPER = DiffusionOptions(learning_rate=1e-4, schedule="constant", batch_size=50, ema=0, stop_on="none")
FAST = DiffusionOptions(schedule="constant", stop_on="none")
TRAINED_STEPS = 50  # of networks from independent seeds
PARAMETER_ACCESSES = 10  # of a training step with Adam: read twice, gradient written; 4 numbers read, 3 written
ACTIVATION_ACCESSES = 5  # of a training step: written, read forward and backward; gradient written and read


def network(inputs: int) -> nn.Sequential:
    """An MLP with 32 hidden units, 32 inputs + 362 numbers."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def population(count: int, inputs: int) -> Collection:
    """Networks whose numbers are random and independent, as those of untrained networks."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = network(inputs).state_dict()
    return Collection({name: torch.randn(count, *t.shape, generator=generator) for name, t in state.items()})


def vectors(count: int, size: int, device: torch.device) -> Tensor:
    """Random vectors (N, D)."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0)).to(device)


def numbers(inputs: int) -> int:
    """D of a network."""
    return HIDDEN * (inputs + 1) + CLASSES * (HIDDEN + 1)


def _training(trainer: Trainer) -> Work:
    """A step of a training. Bytes: of parameters, and of the outputs of layers with weights."""
    written: list[int] = []
    layers = [m for m in trainer.module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [m.register_forward_hook(lambda module, inputs, output: written.append(output.numel())) for m in layers]
    steps = iter(trainer)
    next(steps)
    for hook in hooks:
        hook.remove()
    parameters = sum(parameter.numel() for parameter in trainer.module.parameters())
    moved = 4 * (PARAMETER_ACCESSES * parameters + ACTIVATION_ACCESSES * sum(written))
    return Work(lambda: next(steps), 1, moved)


def paper_autoencoder(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    options = ConvAutoencoderOptions(latent_size=sizes.latent_size, steps=ENDLESS)
    x = vectors(sizes.networks, numbers(sizes.inputs), device)
    autoencoder = options.build(x.shape[1]).to(device)
    batches = shuffled_rows(x, options.batch_size, 0)
    return _training(convolutional.trainer(autoencoder, batches, options, seed=0))


def _denoiser(
    kind: DenoiserOptions, objective: Objective, options: DiffusionOptions, sizes: Sizes, device: torch.device
) -> Work:
    z = vectors(sizes.networks, sizes.latent_size, device)
    options = options.model_copy(update={"steps": ENDLESS})
    batches = shuffled_rows(z, options.batch_size, 0)
    denoiser = kind.build(sizes.latent_size).to(device)
    return _training(diffusion.trainer(denoiser, batches, objective, options, seed=0))


def paper_denoiser(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    return _denoiser(ConvDenoiserOptions(), Epsilon(), PAPER, sizes, device)


def fast_denoiser(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    return _denoiser(MLPDenoiserOptions(), Flow(), FAST, sizes, device)


def fast_sampling(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    denoiser = MLPDenoiserOptions().build(sizes.latent_size).to(device).eval()
    seeds = list(range(sizes.networks))

    def call() -> Tensor:
        options = {"sampler": "heun", "steps": 20, "device": device}
        *_, (_, z) = diffusion.Sampling(Flow(), denoiser, sizes.latent_size, seeds, **options)
        return z

    weights = sum(parameter.numel() for parameter in denoiser.parameters())
    return Work(call, sizes.networks, 4 * 20 * (weights + 2 * sizes.networks * sizes.latent_size))


def fast_pca(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    x = vectors(sizes.networks, numbers(sizes.inputs), device)
    kept = min(sizes.latent_size, len(x) - 1)
    return Work(lambda: PCA.fit(x, latent_size=kept), 1, 4 * (2 * x.numel() + kept * x.shape[1]))


def seeds(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    images = datasets.load(Dataset(name="digits", validation_fraction=0.2))
    settings = SeedsOptions(networks=max(2, sizes.networks // 3), steps=TRAINED_STEPS)
    names = list(mlp(classes=10, channels=1, image_size=8).state_dict())
    numbered = itertools.count()  # a folder for each call, or the second would find its networks finished

    def call() -> object:
        options = {"seed": 0, "device": device, "log": ignore, "folder": folder / f"seeds_{next(numbered)}"}
        return train_all(lambda k: mlp(classes=10, channels=1, image_size=8), images.train, settings, names, **options)

    parameters, pixels = numbers(64), settings.batch_size * 64
    steps = settings.networks * TRAINED_STEPS
    return Work(call, steps, 4 * steps * (PARAMETER_ACCESSES * parameters + 2 * pixels))


def alignment(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    networks = population(sizes.networks, sizes.inputs)
    groups = permutation_groups(network(sizes.inputs), torch.zeros(2, sizes.inputs))
    moved = 4 * 2 * sizes.networks * numbers(sizes.inputs)
    return Work(lambda: align(networks, networks[0], groups), sizes.networks, moved)


def evaluation(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    images = datasets.load(Dataset(name="digits", validation_fraction=0.05)).train
    base = mlp(classes=10, channels=1, image_size=8)
    generator = torch.Generator().manual_seed(0)
    networks = Collection(
        {n: 0.1 * torch.randn(sizes.networks, *t.shape, generator=generator) for n, t in base.state_dict().items()}
    )
    batches = -(-sizes.images // 500)

    def call() -> object:
        found = batch_predictions(base, [networks], images, device=device, batch_size=min(500, sizes.images))
        return list(itertools.islice(found, batches))

    seen = batches * min(500, sizes.images)
    moved = 4 * batches * sizes.networks * numbers(64) + 9 * sizes.networks * seen + 4 * 64 * seen
    return Work(call, sizes.networks * seen, moved)


def similarity(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    wrong = vectors(sizes.networks, 10_000, device) > 1
    pairs = len(wrong) ** 2
    return Work(lambda: wrong_iou(wrong, wrong), pairs, 2 * wrong.numel() + 4 * pairs)


def distances(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    a, b = (vectors(sizes.networks, numbers(sizes.inputs), device) + k for k in (0, 1))
    pairs = len(a) * len(b)
    return Work(lambda: squared_distances(a, b), pairs, 4 * (a.numel() + b.numel()) + 8 * pairs)


def load(sizes: Sizes, device: torch.device, folder: Path) -> Work:
    networks = population(sizes.networks, 8 * sizes.inputs)
    path = folder / "networks.safetensors"
    networks.save(path)

    def call() -> Collection:
        forget(path)
        return Collection.load(path)

    return Work(call, sizes.networks, path.stat().st_size, disk=True)
