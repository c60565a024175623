"""Neural network diffusion: standardise, compress, diffuse, and back (arXiv 2402.13144, section 3)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff.method import diffusion
from pdiff.method.autoencoders import AUTOENCODERS
from pdiff.method.collection import Collection
from pdiff.method.denoisers import DENOISERS
from pdiff.method.generators import LatentDiffusionOptions
from pdiff.method.generators.base import Check, Generator, Tensors, Trajectory, under
from pdiff.method.log import Log, ignore, measured
from pdiff.method.objectives import OBJECTIVES, Objective
from pdiff.method.options import Section, resolve
from pdiff.method.samplers import samplers_of
from pdiff.method.standardize import Standardizer
from pdiff.seeds import sample_seed

HELDOUT_BLOCKS = 4
ENCODED = 256  # vectors that the autoencoder encodes at a time


@dataclass
class LatentDiffusion(Generator):
    """Networks from noise, by a denoiser in the latent space of an autoencoder.

    Attributes:
        standardizer: checkpoints <-> vectors (N, D).
        autoencoder: vectors (N, D) <-> latents (N, L).
        latent_mean: subtracted from latents before diffusion, (L,).
        latent_std: latents are divided by it, (L,).
        denoiser: predicts in latent space; without one, latents are sampled from N(0, 1).
        objective: what it predicts.
    """

    standardizer: Standardizer
    autoencoder: nn.Module
    latent_mean: Tensor
    latent_std: Tensor
    denoiser: nn.Module | None
    objective: Objective

    @classmethod
    def fitted(
        cls,
        collection: Collection,
        options: LatentDiffusionOptions,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        log: Log = ignore,
        state: Path | None = None,
        check: Check = ignore,
    ) -> LatentDiffusion:
        seeds = [sample_seed(seed, k) for k in range(2, 5)]
        fitted, heldout = heldout_split(len(collection), options.diffusion.heldout_fraction, seed=seeds[0])
        standardizer = Standardizer.fit(collection.select(fitted))
        x = standardizer.encode(collection)  # (N, D)
        with measured(log, "autoencoder"):
            resume = {"device": device, "log": log, "path": state and state / "autoencoder.pt"}
            autoencoder = options.autoencoder.fit(x[fitted], seed=seeds[1], **resume)
        check(lambda some: standardizer.decode(through(autoencoder, standardizer.encode(some), device)))
        z = encoded(autoencoder, x, device)  # (N, L)
        mean, std = latent_scale(z[fitted], standardize=options.diffusion.standardize_latents)
        z = ((z - mean) / std).to(device)
        denoiser = None
        if options.diffusion.steps:
            with measured(log, "diffusion"):
                torch.manual_seed(seeds[2])
                resume = {"log": log, "path": state and state / "diffusion.pt"}
                untrained = options.denoiser.build(z.shape[1]).to(device)
                parts = (options.objective, z[fitted], z[heldout], options.diffusion)
                denoiser = diffusion.fit(untrained, *parts, seed=seeds[2], **resume)
        return cls(standardizer, autoencoder, mean, std, denoiser, options.objective)

    def vectors(self, seeds: list[int], *, device: torch.device | str, label: str = "sample", **options: Any) -> Tensor:
        if self.denoiser is None:
            noise, _ = diffusion.gaussian_noise(len(self.latent_mean), seeds)
            return self.decode(noise.to(device))
        steps = self.sampling(seeds, device=device, **options)
        return self.decode(deque(tqdm(steps, desc=label, unit="step", disable=None), maxlen=1).pop()[1])

    def sampling(
        self, seeds: list[int], *, device: torch.device | str, sampler: str = "auto", sampling_steps: int = 20
    ) -> diffusion.Sampling:
        """The way of some latents from noise to data; the options are those of `DiffusionSampling`."""
        name = samplers_of(self.objective)[0] if sampler == "auto" else sampler
        steps = sampling_steps or self.objective.timesteps
        parts = (self.objective, self.denoiser.to(device).eval(), len(self.latent_mean), seeds)
        return diffusion.Sampling(*parts, sampler=name, steps=steps, device=device)

    def warm_up(self, **options: Any) -> None:
        if self.denoiser:
            self.sampling([0], device="cpu", **options)  # imports diffusers

    def sizes(self) -> dict[str, float]:
        return {"latent_size": len(self.latent_mean)}

    def modules(self) -> dict[str, tuple[nn.Module, int]]:
        found = {"autoencoder": (self.autoencoder, self.standardizer.size)}
        if self.denoiser:
            found["diffusion"] = (OneInput(self.denoiser), len(self.latent_mean) + 1)
        return found

    @torch.inference_mode()
    def trajectory(
        self, count: int, *, every: int, seed: int = 0, device: torch.device | str = "cpu", **options: Any
    ) -> Trajectory:
        """Yield the first samples of a seed on their way: timestep, and the networks that noisy latents decode to.

        Args:
            count: how many networks.
            every: denoiser calls between two looks; the samples themselves, at timestep 0, come last.
            seed: of the sampling.
            device: where to compute.
            options: of `sampling`.
        """
        steps = self.sampling([sample_seed(seed, k) for k in range(count)], device=device, **options)
        looks: dict[float, Tensor] = {}
        for call, (t, z) in enumerate(tqdm(steps, desc="trajectory", unit="step", disable=None)):
            if call % every == 0 or call == len(steps) - 1:
                looks[t] = z.clone()  # Heun's method meets most timesteps twice
        yield from ((t, self.standardizer.decode(self.decode(z))) for t, z in looks.items())

    def decode(self, z: Tensor) -> Tensor:
        """Vectors (N, D) of latents as the denoiser has them, (N, L), on the CPU."""
        autoencoder = self.autoencoder.to(z.device).eval()
        return autoencoder.decode(z * self.latent_std.to(z.device) + self.latent_mean.to(z.device)).cpu()

    def tensors(self) -> Tensors:
        parts = {"autoencoder": self.autoencoder, "denoiser": self.denoiser}
        states = {f"{part}.{n}": t for part, module in parts.items() if module for n, t in module.state_dict().items()}
        return {"latent_mean": self.latent_mean, "latent_std": self.latent_std} | states

    def description(self) -> dict[str, Any]:
        (prediction,) = (name for name, kind in OBJECTIVES.items() if type(self.objective) is kind)
        return {
            "autoencoder": described(AUTOENCODERS, self.autoencoder),
            "denoiser": self.denoiser and described(DENOISERS, self.denoiser),
            "objective": {"prediction": prediction, **self.objective.model_dump()},
        }

    @classmethod
    def restored(cls, standardizer: Standardizer, tensors: Tensors, description: dict[str, Any]) -> LatentDiffusion:
        autoencoder = built(AUTOENCODERS, description["autoencoder"], under("autoencoder.", tensors))
        denoiser = description["denoiser"] and built(DENOISERS, description["denoiser"], under("denoiser.", tensors))
        objective = dict(description["objective"])
        mean, std = tensors["latent_mean"], tensors["latent_std"]
        if {mean.shape, std.shape} != {(autoencoder.latent_size,)}:
            raise ValueError(f"latent_mean and latent_std do not hold {autoencoder.latent_size} numbers")
        if standardizer.size != autoencoder.size:
            raise ValueError(f"its slots hold {standardizer.size} numbers, its autoencoder {autoencoder.size}")
        return cls(standardizer, autoencoder, mean, std, denoiser, OBJECTIVES[objective.pop("prediction")](**objective))


class OneInput(nn.Module):
    """A denoiser of one input: latents and, as the last column, timesteps, (B, L + 1) -> prediction (B, L)."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, rows: Tensor) -> Tensor:
        return self.denoiser(rows[:, :-1], rows[:, -1])


def described(kinds: dict[str, type[Section]], module: nn.Module) -> dict[str, Any]:
    """Kind and constructor's arguments of a module of a registry."""
    (kind,) = (kind for kind, options in kinds.items() if type(module) is resolve(options.module))
    return {"kind": kind, **module.options}


def built(kinds: dict[str, type[Section]], description: dict[str, Any], state: Tensors) -> nn.Module:
    """The module that was `described`, with its tensors, in evaluation mode."""
    arguments = dict(description)
    module = resolve(kinds[arguments.pop("kind")].module)(**arguments)
    module.load_state_dict(state)
    return module.eval()


@torch.inference_mode()
def encoded(autoencoder: nn.Module, x: Tensor, device: torch.device | str) -> Tensor:
    """Latents of vectors (N, D), (N, L), on the CPU."""
    return torch.cat([autoencoder.encode(rows.to(device)).cpu() for rows in x.split(ENCODED)])


@torch.inference_mode()
def through(autoencoder: nn.Module, x: Tensor, device: torch.device | str) -> Tensor:
    """Reconstructions of vectors (N, D), on the CPU."""
    return torch.cat([autoencoder(rows.to(device)).cpu() for rows in x.split(ENCODED)])


def heldout_split(count: int, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of checkpoints to fit on and of those held out, both ascending; at least two to fit on, if there are.

    Held out are a few blocks of consecutive checkpoints: neighbours on a trajectory are nearly copies of each other,
    so that single held-out checkpoints would not tell a generator that memorises from one that generalises.
    """
    held = min(round(count * fraction), max(count - 2, 0))
    blocks = min(HELDOUT_BLOCKS, max(held, 1))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(count, dtype=torch.bool)
    for block in range(blocks):
        start, end = block * count // blocks, (block + 1) * count // blocks
        length = (block + 1) * held // blocks - block * held // blocks
        first = start + int(torch.randint(end - start - length + 1, (), generator=generator))
        mask[first : first + length] = True
    return (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]


def latent_scale(z: Tensor, *, standardize: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every component of latents (N, L), (L,) each; 0 and 1 if not standardised."""
    if not standardize:
        return torch.zeros(z.shape[1]), torch.ones(z.shape[1])
    std = z.std(dim=0, correction=int(len(z) > 1))
    return z.mean(dim=0).cpu(), torch.where(std > 1e-8, std, 1.0).cpu()
