"""A generator as an MLflow model. MLflow runs this file when it loads the model ("models from code"): no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from pdiff.method.generators.base import Generator


class NewWeights(mlflow.pyfunc.PythonModel):
    """Samples networks: `predict` takes one row with columns `count` and `seed`; returns name -> (count, *shape)."""

    def load_context(self, context: Any) -> None:
        """Load the generator."""
        self.generator = Generator.load(Path(context.artifacts["generator"]))
        self.options = dict(context.model_config)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict | None = None) -> dict[str, np.ndarray]:
        """Networks 0 .. count - 1 of a seed."""
        count, seed = (int(model_input[name].iloc[0]) for name in ("count", "seed"))
        networks = self.generator.sample(count, seed=seed, **self.options)
        return {name: tensor.numpy() for name, tensor in networks.tensors.items()}


mlflow.models.set_model(NewWeights())
