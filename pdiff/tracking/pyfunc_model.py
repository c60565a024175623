"""A generator as an MLflow model. MLflow runs this file when it loads the model ("models from code"): no pickle."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import torch
from mlflow.exceptions import MlflowException

BATCH = 256  # networks sampled at a time
COPIES = 3  # of all networks in memory: the batches, the whole, and what is made of it
LEAST = {"count": 1, "seed": 0}
"""The columns of the input, and their smallest values."""


class NewWeights(mlflow.pyfunc.PythonModel):
    """Samples networks.

    `predict` takes rows of `count` and `seed`, and returns a list with one entry for each row: a dictionary
    name of the tensor -> array (count, *shape), the networks 0 .. count - 1 of that seed. In the JSON of
    `mlflow models serve`, `predictions[row][name][k]` is that tensor of network k, as nested lists.

    A mistake in the input is an MlflowException, INVALID_PARAMETER_VALUE, which is answered with HTTP status 400.
    """

    def load_context(self, context: Any) -> None:
        """Load the generator."""
        _prefer_installed(str(Path(__file__).with_name("code")))
        from pdiff.method.generators.base import Generator

        self.generator = Generator.load(Path(context.artifacts["generator"]))
        self.options = dict(context.model_config or {})  # MLflow makes None of {}

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict | None = None
    ) -> list[dict[str, np.ndarray]]:
        """The networks of every row."""
        rows = [tuple(_whole(model_input, name, row) for name in LEAST) for row in range(len(model_input))]
        if not rows:
            raise MlflowException.invalid_parameter_value("no rows, expected at least one with count and seed")
        self._check_memory(sum(count for count, _ in rows))
        return [self._sampled(count, seed) for count, seed in rows]

    def _sampled(self, count: int, seed: int) -> dict[str, np.ndarray]:
        """The networks of one row, batch by batch."""
        parts = []
        for first in range(0, count, BATCH):
            part = self.generator.sample(min(BATCH, count - first), seed=seed, first=first, **self.options)
            parts.append({name: _array(tensor) for name, tensor in part.tensors.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _check_memory(self, count: int) -> None:
        size = COPIES * sum(tensor.nbytes for tensor in self.generator.standardizer.example().tensors.values())
        free = psutil.virtual_memory().available
        if count > free // size:
            raise MlflowException.invalid_parameter_value(
                f"count: {count} networks, expected at most {free // size} in one request: each takes {size} bytes, "
                f"and {free} bytes of memory are free"
            )


def _prefer_installed(code: str) -> None:
    """Take the code that travels with the model, which is a part of pdiff, from the front of sys.path where pdiff is
    installed: MLflow puts it there, and it would hide the rest."""
    if code in sys.path:
        sys.path.remove(code)
        installed = find_spec("pdiff")
        if installed is None or installed.origin is None:  # without an origin: any folder of this name
            sys.path.insert(0, code)


def _whole(rows: pd.DataFrame, name: str, row: int) -> int:
    """A value of a column as a whole number, never cut."""
    value = rows[name].iloc[row]
    number = isinstance(value, Integral) and not isinstance(value, bool)
    number = number or (isinstance(value, float | np.floating) and float(value).is_integer())
    if not number or value < LEAST[name]:
        shown = repr(value.item() if isinstance(value, np.generic) else value)[:80]
        raise MlflowException.invalid_parameter_value(
            f"row {row}: {name} is {shown}, expected a whole number >= {LEAST[name]}"
        )
    return int(value)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


mlflow.models.set_model(NewWeights())
