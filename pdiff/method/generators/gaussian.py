"""A Gaussian as a generator: the mean of the checkpoints, and their covariance in PCA space or per parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdiff.files import scratch
from pdiff.method.autoencoders.pca import PCA, ROWS
from pdiff.method.collection import Collection
from pdiff.method.diffusion import gaussian_noise
from pdiff.method.generators import GaussianOptions
from pdiff.method.generators.base import Check, Generator, Tensors
from pdiff.method.log import Log, ignore, measured
from pdiff.method.standardize import Standardizer
from pdiff.method.vectors import Matrix, deviations, matrix, over_columns


class Gaussian(Generator):
    """x = mean + scale (std eps) W, with W the principal components (L, D); per parameter: x = mean + scale std eps.

    Fitted and sampled on the CPU, whatever the device.

    Attributes:
        mean: (D,).
        std: standard deviations, (L,) along the components, or (D,) per parameter.
        components: W (L, D), orthonormal rows; None: per parameter.
        scale: what the deviations are multiplied by.
    """

    def __init__(
        self, standardizer: Standardizer, mean: Tensor, std: Tensor, components: Tensor | None, scale: float
    ) -> None:
        self.standardizer, self.mean, self.std = standardizer, mean, std
        self.components, self.scale = components, scale

    @classmethod
    def fit(
        cls,
        collection: Collection,
        options: GaussianOptions,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        log: Log = ignore,
        state: Path | None = None,
        check: Check = ignore,
    ) -> Gaussian:
        with measured(log, "gaussian"):
            standardizer = Standardizer.fit(collection)
            x = standardizer.vectors(collection)  # (N, D)
            correction = int(len(x) > 1)
            if options.diagonal:
                mean = over_columns(lambda block: block.mean(0), x)
                return cls(standardizer, mean, deviations(x, correction=correction), None, options.scale)
            pca = PCA.fit(x, variance=options.variance)
            z = torch.cat([pca.encode(rows) for rows in x.split(ROWS)])  # (N, L)
            std = z.std(0, correction=correction)
            return cls(standardizer, pca.center, std, pca.components, options.scale)

    def sample_vectors(self, seeds: list[int], *, device: torch.device | str, label: str = "sample") -> Matrix:
        scaled = scratch(len(seeds), len(self.std))
        for row, seed in zip(scaled, seeds, strict=True):
            noise, _ = gaussian_noise(len(self.std), [seed])
            row.copy_(self.scale * self.std * noise[0])

        def columns(rows: Tensor | slice, part: slice) -> Tensor:
            if self.components is None:
                return self.mean[part] + scaled[rows, part]
            return self.mean[part] + scaled[rows] @ self.components[:, part]

        return matrix(len(seeds), len(self.mean), columns)

    def sizes(self) -> dict[str, float]:
        return {"latent_size": len(self.std)}

    def tensors(self) -> Tensors:
        optional = {} if self.components is None else {"components": self.components}
        return {"mean": self.mean, "std": self.std} | optional

    def config(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def from_saved(cls, standardizer: Standardizer, tensors: Tensors, config: dict[str, Any]) -> Gaussian:
        mean, std, components = tensors["mean"], tensors["std"], tensors.get("components")
        size = standardizer.size
        expected = (size,) if components is None else (len(components),)
        fits = mean.shape == (size,) and std.shape == expected
        if not fits or (components is not None and components.shape != (*expected, size)):
            raise ValueError(f"mean, std and components do not describe {size} numbers")
        return cls(standardizer, mean, std, components, float(config["scale"]))
