"""Logged and registered models: the parts of a generator as exported programs, and all of it as code and tensors."""

from __future__ import annotations

import ast
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType, Array
from tqdm.auto import tqdm

import pdiff
from pdiff import compat
from pdiff.experiment.schema import Experiment
from pdiff.method.collection import Collection
from pdiff.method.generators.base import Generator

SAMPLING = ("__init__.py", "compat.py", "errors.py", "files.py", "seeds.py", "parallel", "method")
"""Modules and packages of pdiff that sampling needs; they travel with the model."""
ELEMENTS = {torch.float64: DataType.double, torch.bool: DataType.boolean}
"""MLflow's names of types, where they are not those of every float or integer."""
LARGEST_PROGRAM = 1 << 30  # bytes of the weights of an exported program: PyTorch copies them in memory
INPUTS = Schema([ColSpec(AnyType(), name) for name in ("count", "seed")])
"""Of any type: where one is declared, MLflow's server casts to it, and 2.7 becomes 2. The model itself checks them."""


def log(experiment: Experiment, folder: Path) -> None:
    """Log the models of a generator in the active run, and register it if the experiment asks for it.

    Args:
        experiment: how the model samples, and what it is called.
        folder: what `Generator.save` wrote.
    """
    generator = Generator.load(folder)
    with _quiet(), TemporaryDirectory() as scratch:
        if experiment.log_models:
            _log_programs(generator)
        code, model = travelling_code(Path(scratch)), Path(__file__).with_name("pyfunc_model.py")
        logged = mlflow.pyfunc.log_model(
            name="generator",
            python_model=str(model),
            artifacts={"generator": str(folder)},
            model_config=experiment.sampling,
            code_paths=[str(code)],
            signature=ModelSignature(INPUTS, outputs(generator.standardizer.example())),
            pip_requirements=requirements(*code.rglob("*.py"), model),
        )
    if experiment.register:
        register(logged.model_uri, f"pdiff-{experiment.tag}")


def register(model_uri: str, name: str) -> None:
    """Register a logged model as the new version of a name."""
    with _quiet():
        mlflow.register_model(model_uri, name)


def outputs(networks: Collection) -> Schema:
    """What the model returns for each row: every tensor of its networks, as nested arrays (count, *shape)."""
    columns = []
    for name, tensor in networks.tensors.items():
        kind: Any = ELEMENTS.get(tensor.dtype, DataType.float if tensor.is_floating_point() else DataType.long)
        for _ in tensor.shape:
            kind = Array(kind)
        columns.append(ColSpec(kind, name))
    return Schema(columns)


def travelling_code(folder: Path) -> Path:
    """Copy what sampling needs of this package into a folder, from which it can be imported."""
    package, source = folder / "pdiff", Path(pdiff.__file__).parent
    package.mkdir()
    for path in (source / name for name in SAMPLING):
        if path.is_dir():
            shutil.copytree(path, package / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, package)
    return package


def requirements(*sources: Path) -> list[str]:
    """The installed versions of all that some source files import, beside the standard library and this package."""
    names = {"mlflow", "torch"}
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    external = sorted(names - set(sys.stdlib_module_names) - {"pdiff"})
    return [f"{name}=={version(name).partition('+')[0]}" for name in map(distribution, external) if name]  # not +cpu


def distribution(module: str) -> str:
    """The installed distribution that a module belongs to; empty where it is not installed."""
    with suppress(PackageNotFoundError):
        version(module)  # most have the name of their module, and asking all takes long
        return module
    return next(iter(packages_distributions().get(module, [])), "")


def _log_programs(generator: Generator) -> None:
    """Log the modules of a generator as exported programs, which need no code of this package."""
    if not compat.exports_models():
        tqdm.write("train: autoencoder and diffusion are logged as models by PyTorch 2.1 or newer alone")
        return
    for name, (module, width) in generator.modules().items():
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        if size > LARGEST_PROGRAM:
            tqdm.write(
                f"train: {name} is not logged as a separate model: an export of {size / 1e9:.1f} GB takes memory"
            )
            continue
        example = np.zeros((2, width), dtype=np.float32)
        mlflow.pytorch.log_model(module, name=name, input_example=example, pip_requirements=requirements())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's notes on what it infers about models, and on what it has registered, from the terminal."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
