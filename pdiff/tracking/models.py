"""TODO tracking.models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import torch
from tqdm.auto import tqdm

from pdiff import compat
from pdiff.experiment.schema import Experiment
from pdiff.method.generators.base import Generator

REQUIREMENTS = [f"{name}=={version(name)}" for name in ("torch", "diffusers", "mlflow")]  # of logged models


def _register(run_id: str, name: str) -> None:
    """Register the generator of a run of train as a model, once."""
    versions = mlflow.search_model_versions(filter_string=f"name = '{name}'")
    if run_id not in {version.run_id for version in versions}:
        mlflow.register_model(f"runs:/{run_id}/generator", name)


def _log_models(generator: Generator) -> None:
    """Log the autoencoder and the denoiser as PyTorch models (exported programs, not pickles)."""
    if not compat.exports_models():
        tqdm.write("train: autoencoder and diffusion are logged as models by PyTorch 2.1 or newer alone")
        return
    modules = {"autoencoder": (generator.autoencoder, generator.standardizer.size)}
    if generator.denoiser:
        modules["diffusion"] = (Denoising(generator.denoiser), len(generator.latent_mean) + 1)
    with _quiet():
        for name, (module, size) in modules.items():
            example = np.zeros((2, size), dtype=np.float32)
            mlflow.pytorch.log_model(module, name=name, input_example=example, pip_requirements=REQUIREMENTS)


class Denoising(torch.nn.Module):
    """A denoiser of one input, as MLflow's models have it: latents and, as the last column, timesteps (B, L + 1)."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Prediction (B, L)."""
        return self.denoiser(rows[:, :-1], rows[:, -1])


def _log_generator(experiment: Experiment, folder: Path) -> None:
    """Log a model whose `predict` returns new weights."""
    with _quiet():
        mlflow.pyfunc.log_model(
            name="generator",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"generator": str(folder)},
            model_config=experiment.sampling,
            pip_requirements=REQUIREMENTS,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's notes on what it infers about models from the terminal."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
