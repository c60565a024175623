"""Logged and registered models load and predict where pdiff is not installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from elsewhere import HIDE
from safetensors.torch import load_file
from tracked import artifacts, runs

from pdiff.cli.main import main as pdiff
from pdiff.method.generators.base import Generator
from pdiff.tracking import models

pytestmark = pytest.mark.slow

ELSEWHERE = """
try:
    import pdiff.seeds
    sys.exit("pdiff can be imported")
except ModuleNotFoundError:
    pass

import mlflow
import numpy as np
import pandas as pd

uri, autoencoder, diffusion, out = sys.argv[1:]
mlflow.set_tracking_uri(uri)
found = {}
for name, model in (("autoencoder", autoencoder), ("diffusion", diffusion)):
    if model:
        program = mlflow.pyfunc.load_model(model)
        width = program.metadata.signature.inputs.inputs[0].shape[1]
        found[name] = program.predict(np.full((3, width), 0.5, dtype=np.float32))
model = mlflow.pyfunc.load_model("models:/pdiff-tiny/1")
(weights,) = model.predict(pd.DataFrame({"count": [8], "seed": [0]}))
np.savez(out, **found, **{f"weights.{name}": array for name, array in weights.items()})
"""


@pytest.mark.slow
def test_models_predict_where_pdiff_is_not_installed(workspace):
    words = ["--tag", "tiny.yaml", "--log_models", "true"]
    assert pdiff(["generate", *words]) == 0
    for _ in range(2):  # a finished run is registered, too, and once
        assert pdiff(["train", *words, "--register", "true"]) == 0
    assert [version.version for version in mlflow.search_model_versions()] == [1]
    (run,) = runs("train")
    logged = {model.name: model for model in mlflow.search_logged_models(output_format="list")}
    programs = [logged[name].model_uri if name in logged else "" for name in ("autoencoder", "diffusion")]
    assert all(programs) == (find_spec("torch.export") is not None)  # since PyTorch 2.1

    command = [sys.executable, "-I", "-c", HIDE + ELSEWHERE, mlflow.get_tracking_uri(), *programs, "predicted.npz"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    predicted = {name: torch.from_numpy(array) for name, array in np.load("predicted.npz").items()}

    sampled = load_file(artifacts(runs("generate")[0]) / "generated.safetensors")
    for name, tensor in sampled.items():
        torch.testing.assert_close(predicted[f"weights.{name}"], tensor)
    generator = Generator.load(artifacts(run) / "generator")
    with torch.no_grad():
        if programs[0]:
            vectors = torch.full((3, generator.standardizer.size), 0.5)
            torch.testing.assert_close(predicted["autoencoder"], generator.autoencoder(vectors))
            latents, timesteps = torch.full((3, len(generator.latent_mean)), 0.5), torch.full((3,), 0.5)
            torch.testing.assert_close(predicted["diffusion"], generator.denoiser(latents, timesteps))

    lines = Path(logged["generator"].artifact_location, "requirements.txt").read_text().splitlines()
    required = dict(line.split("==") for line in lines)
    assert {"torch", "numpy", "safetensors", "pydantic", "tqdm", "mlflow", "pandas"} <= required.keys()
    assert all(found == version(name).partition("+")[0] for name, found in required.items())


@pytest.mark.slow
def test_a_model_is_registered_that_need_not_be_logged(workspace):
    words = ["train", "--tag", "tiny.yaml", "--log_models", "false"]
    assert pdiff(words) == 0
    assert mlflow.search_logged_models(output_format="list") == []
    for _ in range(2):
        assert pdiff([*words, "--register", "true"]) == 0
    assert [version.name for version in mlflow.search_model_versions()] == ["pdiff-tiny"]
    assert [model.name for model in mlflow.search_logged_models(output_format="list")] == ["generator"]


@pytest.mark.slow
def test_requirements_are_what_the_code_imports(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "import os, numpy.linalg\nfrom pdiff import seeds\nfrom . import x\ndef f():\n    import yaml, nowhere"
    )
    names = ("PyYAML", "mlflow", "numpy", "torch")
    expected = {f"{name}=={version(name).partition('+')[0]}".lower() for name in names}
    assert {line.lower() for line in models.requirements(path)} == expected
