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

COPIES = 4  # of a network that sampling has in memory at a time: its noise and vector, and those on the way to tensors
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
        sampled = (self.generator.sample(count, seed=seed, **self.options).tensors for count, seed in rows)
        return [{name: _array(tensor) for name, tensor in tensors.items()} for tensors in sampled]

    def _check_memory(self, count: int) -> None:
        size = COPIES * sum(tensor.nbytes for tensor in self.generator.standardizer.example().tensors.values())
        limit = psutil.virtual_memory().available // size
        if count > limit:
            raise MlflowException.invalid_parameter_value(
                f"count: {count} networks, expected at most {limit} in one request: sampling one takes {size} bytes, "
                "and no more memory is free"
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
    if not (number or (isinstance(value, float) and value.is_integer())) or value < LEAST[name]:
        shown = repr(value.item() if isinstance(value, np.generic) else value)[:80]
        raise MlflowException.invalid_parameter_value(
            f"row {row}: {name} is {shown}, expected a whole number >= {LEAST[name]}"
        )
    return int(value)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


mlflow.models.set_model(NewWeights())
