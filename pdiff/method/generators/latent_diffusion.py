"""Neural network diffusion: standardise, compress, diffuse, and back (arXiv 2402.13144, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pdiff import compat
from pdiff.method import diffusion
from pdiff.method.autoencoders import AUTOENCODERS
from pdiff.method.autoencoders.pca import PCA
from pdiff.method.collection import Collection, heldout_split
from pdiff.method.denoisers import DENOISERS
from pdiff.method.generators import LatentDiffusionOptions
from pdiff.method.generators.base import Check, Tensors, with_prefix
from pdiff.method.generators.denoising import DenoisingGenerator, fit_denoiser, objective_from
from pdiff.method.log import Log, ignore, measured
from pdiff.method.objectives import Objective
from pdiff.method.options import Section, resolve
from pdiff.method.standardize import Standardizer
from pdiff.method.vectors import Matrix, dense, joined
from pdiff.seeds import stream

ENCODED = 256  # vectors that the autoencoder encodes at a time


@dataclass
class LatentDiffusion(DenoisingGenerator):
    """Networks from noise, by a denoiser in the latent space of an autoencoder.

    Attributes:
        standardizer: checkpoints <-> vectors (N, D).
        autoencoder: vectors (N, D) <-> latents (N, L).
        latent_mean: subtracted from latents before diffusion, (L,).
        latent_std: latents are then divided by it, (L,).
        denoiser: predicts in latent space; None: latents are sampled from N(0, 1).
        objective: what the denoiser predicts.
        diagnostics: of the denoiser, as fitted; not saved.
    """

    compresses: ClassVar[bool] = True

    standardizer: Standardizer
    autoencoder: nn.Module
    latent_mean: Tensor
    latent_std: Tensor
    denoiser: nn.Module | None
    objective: Objective
    diagnostics: diffusion.Diagnostics | None = None

    @classmethod
    def fit(
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
        fraction, steps = options.diffusion.heldout_fraction, options.diffusion.steps
        kept, heldout = heldout_split(len(collection), fraction, seed=stream(seed, "heldout"))
        standardizer = Standardizer.fit(collection, kept)
        x = standardizer.vectors(collection)  # (N, D)
        with measured(log, "autoencoder"):
            resume = {"log": log, "path": state and state / "autoencoder.pt"}
            autoencoder = options.autoencoder.fit(x[kept], seed=stream(seed, "autoencoder"), device=device, **resume)
        check(lambda networks: standardizer.decode(reconstruct(autoencoder, standardizer.vectors(networks), device)))
        z = encode(autoencoder, x, device)  # (N, L)
        mean, std = latent_scale(z[kept], standardize=options.diffusion.standardize_latents)
        z = ((z - mean) / std).to(device)
        denoiser = diagnostics = None
        if steps:
            build = partial(options.denoiser.build, z.shape[1])
            data = (options.objective, z[kept], z[heldout], options.diffusion)
            resume = {"seed": seed, "device": device, "log": log, "state": state}
            denoiser, diagnostics = fit_denoiser(build, *data, fitted=z[kept], **resume)
        return cls(standardizer, autoencoder, mean, std, denoiser, options.objective, diagnostics)

    def reconstruct(self, networks: Collection, *, device: torch.device | str = "cpu") -> Collection:
        vectors = self.standardizer.vectors(networks)
        return self.standardizer.decode(reconstruct(self.autoencoder.to(device).eval(), vectors, device))

    @property
    def latent_size(self) -> int:
        return len(self.latent_mean)

    def modules(self) -> dict[str, tuple[nn.Module, int]]:
        return {"autoencoder": (self.autoencoder, self.standardizer.size)} | super().modules()

    def decode(self, z: Tensor) -> Matrix:
        autoencoder = self.autoencoder.to(z.device).eval()
        return decoded(autoencoder, z * self.latent_std.to(z.device) + self.latent_mean.to(z.device))

    def tensors(self) -> Tensors:
        parts = {"autoencoder": self.autoencoder}
        if self.denoiser is not None:
            parts["denoiser"] = self.denoiser
        states = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
        return {"latent_mean": self.latent_mean, "latent_std": self.latent_std} | states

    def config(self) -> dict[str, Any]:
        return {
            "autoencoder": to_config(AUTOENCODERS, self.autoencoder),
            "denoiser": None if self.denoiser is None else to_config(DENOISERS, self.denoiser),
            "objective": self.objective_config(),
        }

    @classmethod
    def from_saved(cls, standardizer: Standardizer, tensors: Tensors, config: dict[str, Any]) -> LatentDiffusion:
        autoencoder = from_config(AUTOENCODERS, config["autoencoder"], with_prefix("autoencoder.", tensors))
        denoiser = config["denoiser"]
        if denoiser is not None:
            denoiser = from_config(DENOISERS, denoiser, with_prefix("denoiser.", tensors))
        mean, std = tensors["latent_mean"], tensors["latent_std"]
        if {mean.shape, std.shape} != {(autoencoder.latent_size,)}:
            raise ValueError(f"latent_mean and latent_std do not hold {autoencoder.latent_size} numbers")
        if standardizer.size != autoencoder.size:
            raise ValueError(f"its slots hold {standardizer.size} numbers, its autoencoder {autoencoder.size}")
        return cls(standardizer, autoencoder, mean, std, denoiser, objective_from(config["objective"]))


def to_config(registry: dict[str, type[Section]], module: nn.Module) -> dict[str, Any]:
    """A module of a registry as plain data: its kind, and its constructor's arguments."""
    kind = next(kind for kind, options in registry.items() if type(module) is resolve(options.module))
    return {"kind": kind, **module.options}


def from_config(registry: dict[str, type[Section]], config: dict[str, Any], state: Tensors) -> nn.Module:
    """The module of a `to_config`, with the tensors of its state dict, in evaluation mode."""
    arguments = dict(config)
    module = resolve(registry[arguments.pop("kind")].module)(**arguments)
    module.load_state_dict(state, **compat.assigned())
    return module.eval()


@torch.no_grad()
def encode(autoencoder: nn.Module, x: Matrix, device: torch.device | str) -> Tensor:
    """Latents (N, L), on the CPU, of vectors (N, D), batch by batch."""
    linear = isinstance(autoencoder, PCA)  # it reads columns, others whole vectors
    batches = (rows.to(device) for rows in x.split(ENCODED))
    return torch.cat([autoencoder.encode(rows if linear else dense(rows)).cpu() for rows in batches])


@torch.no_grad()
def reconstruct(autoencoder: nn.Module, x: Matrix, device: torch.device | str) -> Matrix:
    """Reconstructions (N, D), on the CPU, of vectors (N, D), batch by batch."""
    latents = encode(autoencoder, x, device).to(device)
    return joined([decoded(autoencoder, z) for z in latents.split(ENCODED)])


def decoded(autoencoder: nn.Module, z: Tensor) -> Matrix:
    """Vectors (B, D), on the CPU, of latents (B, L); those of a PCA are computed where they are read, if many."""
    return autoencoder.vectors(z).to("cpu") if isinstance(autoencoder, PCA) else autoencoder.decode(z).cpu()


def latent_scale(z: Tensor, *, standardize: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every component of latents (N, L), (L,) each; 0 and 1 if not standardised."""
    if not standardize:
        return torch.zeros(z.shape[1]), torch.ones(z.shape[1])
    std = z.std(dim=0, correction=int(len(z) > 1))
    return z.mean(dim=0).cpu(), torch.where(std > 1e-8, std, 1.0).cpu()  # constant components are not divided
