"""One place for each thing: toys of every kind are registered from this file, and `main` runs with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import mlflow
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tracked import artifacts, runs

from pdiff.cli.main import main as pdiff
from pdiff.experiment import metrics, stages
from pdiff.experiment.metrics import Metric
from pdiff.experiment.stages import Stage
from pdiff.method import autoencoders, baselines, denoisers, generators, objectives, samplers
from pdiff.method.autoencoders import AutoencoderOptions
from pdiff.method.baselines import Baseline, Fitted
from pdiff.method.denoisers import DenoiserOptions
from pdiff.method.generators import GeneratorOptions
from pdiff.method.generators.base import Generator
from pdiff.method.log import Point, ignore
from pdiff.method.objectives import Flow
from pdiff.method.options import Positive
from pdiff.method.samplers import Sampler
from pdiff.method.standardize import Standardizer
from pdiff.networks import architectures, datasets, evaluators
from pdiff.networks.datasets import Source
from pdiff.networks.evaluators import Evaluation, EvaluatorOptions
from pdiff.networks.images import Pixels


class Halves(nn.Module):
    """Keeps the first half of a vector."""

    def __init__(self, size: int, latent_size: int) -> None:
        super().__init__()
        self.size, self.latent_size = size, latent_size
        self.options = {"size": size, "latent_size": latent_size}
        self.register_buffer("rest", torch.zeros(size - latent_size))

    def encode(self, x: Tensor) -> Tensor:
        return x[:, : self.latent_size]

    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([z, self.rest.expand(len(z), -1)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class HalvesOptions(AutoencoderOptions):
    module: ClassVar[Any] = Halves
    fraction: float = 0.5

    def fit(self, x: Tensor, *, seed: int, device: Any, log: Any, path: Path | None = None) -> nn.Module:
        halves = Halves(x.shape[1], int(x.shape[1] * self.fraction))
        halves.rest.copy_(x[:, halves.latent_size :].mean(0))
        log(Point("autoencoder/loss", 0.25))
        return halves.to(device).eval()


class Linear(nn.Module):
    def __init__(self, latent_size: int, *, rank: int) -> None:
        super().__init__()
        self.options = {"latent_size": latent_size, "rank": rank}
        self.layers = nn.Sequential(nn.Linear(latent_size, rank), nn.Linear(rank, latent_size))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.layers(z)


class LinearOptions(DenoiserOptions):
    module: ClassVar[Any] = Linear
    rank: Positive = 4


class Backwards(Flow):
    """Flow matching that predicts the path from noise to data."""

    prediction_type: ClassVar[str] = "backwards"
    path: ClassVar[str] = "backwards"

    def add_noise(self, z: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_t, t, target = super().add_noise(z, noise, u)
        return z_t, t, -target


class Straight:
    """A scheduler of one step."""

    def __init__(self, objective: Any) -> None:
        self.timesteps = torch.tensor([float(objective.timesteps)])

    def step(self, prediction: Tensor, t: Tensor, z: Tensor, generator: Any) -> Any:
        self.prev_sample = z + prediction
        return self

    def set_timesteps(self, timesteps: Any, device: Any) -> None:
        pass


class Copies(Generator):
    """Gives the first checkpoint again and again."""

    def __init__(self, standardizer: Standardizer, first: Tensor) -> None:
        self.standardizer, self.first = standardizer, first

    @classmethod
    def fit(cls, collection, options, *, seed=0, device="cpu", log=ignore, state=None, check=ignore) -> Copies:
        standardizer = Standardizer.fit(collection)
        return cls(standardizer, options.factor * standardizer.encode(collection)[0])

    def sample_vectors(self, seeds: list[int], *, device: Any, label: str = "") -> Tensor:
        return self.first.expand(len(seeds), -1)

    def tensors(self) -> dict[str, Tensor]:
        return {"first": self.first}

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_saved(cls, standardizer, tensors, config) -> Copies:
        return cls(standardizer, tensors["first"])


class CopiesOptions(GeneratorOptions):
    implementation: ClassVar[Any] = Copies
    factor: float = 1.0


class Fair(EvaluatorOptions):
    """Finds every network as good as every other."""

    accuracy: float = 0.5

    def make(self, context: Any) -> Any:
        return lambda groups, folder: {
            "test": {
                n: Evaluation(torch.full((len(g),), self.accuracy, dtype=torch.float64)) for n, g in groups.items()
            }
        }


def stripes(root: Path, download: bool) -> tuple[Pixels, Pixels]:
    """Images of horizontal and vertical stripes."""
    g = torch.Generator().manual_seed(0)

    def part(count: int) -> Pixels:
        labels = torch.arange(count) % 2
        rows = (torch.arange(8) % 2 * 200).expand(8, 8)
        images = torch.stack([rows if label else rows.T for label in labels])[:, None]
        noise = torch.randint(0, 50, images.shape, generator=g)
        return Pixels((images + noise).to(torch.uint8), labels)

    return part(120), part(40)


def one_layer(*, classes: int, channels: int, image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, classes))


def biases(experiment: Any, out: Path, log: Any, *, generate: Path) -> dict[str, float]:
    """A stage that looks at the generated networks."""
    bias = load_file(generate / "generated.safetensors")["1.bias"]
    (out / "biases.txt").write_text(str(bias.tolist()))
    return {"largest_bias": bias.abs().max().item()}


def first_only(fitted: Fitted, count: int, seed: int) -> Tensor:
    return fitted.vectors[:1]


TOY = """
dataset: {name: stripes, validation_fraction: 0.2}
network: {architecture: one_layer}
prepare: {pretrain: {epochs: 1, batch_size: 32}, collect: {checkpoints: 12, batch_size: 32}}
generate: {count: 3}
"""


@pytest.fixture
def registered(workspace, monkeypatch):
    """Every toy under its name."""
    entries = [
        (autoencoders.AUTOENCODERS, "halves", HalvesOptions),
        (denoisers.DENOISERS, "linear", LinearOptions),
        (objectives.OBJECTIVES, "backwards", Backwards),
        (samplers.SAMPLERS, "straight", Sampler(("backwards",), Straight)),
        (generators.GENERATORS, "copies", CopiesOptions),
        (baselines.BASELINES, "first_only", Baseline("first_only", first_only, "The first original.")),
        (metrics.METRICS, "loudness", Metric("loudness", heading="loud", measure=loudness, statistics=("mean",))),
        (datasets.DATASETS, "stripes", Source(stripes, 2, 1, 8)),
        (architectures.ARCHITECTURES, "one_layer", one_layer),
        (evaluators.EVALUATORS, "fair", Fair),
        (stages.STAGES, "biases", Stage(biases, reads=("generate",), decided_by=lambda experiment: {})),
    ]
    for registry, name, entry in entries:
        monkeypatch.setitem(registry, name, entry)
    Path("toy.yaml").write_text(TOY)


def loudness(group: Any) -> Tensor:
    return group.networks.tensors["1.weight"].flatten(1).abs().mean(dim=1)


def table() -> pd.DataFrame:
    return pd.read_csv(artifacts(runs("evaluate")[-1]) / "evaluation.csv").set_index("group")


@pytest.mark.slow
def test_parts_of_latent_diffusion(registered, capsys):
    words = ["--autoencoder.kind", "halves", "--autoencoder.fraction", "0.25", "--diffusion.denoiser", "linear"]
    words += ["--diffusion.rank", "2", "--diffusion.prediction", "backwards", "--generate.sampler", "straight"]
    words += ["--diffusion.steps", "20", "--evaluate.baselines", "[average, first_only]", "--evaluate.noise", "[]"]
    assert pdiff(["main", "--tag", "toy.yaml", *words]) == 0
    (parent,) = runs("main")
    assert parent.data.params["config.autoencoder.fraction"] == "0.25"
    assert parent.data.metrics["latent_size"] == int((64 * 2 + 2) * 0.25) and "diffusion/loss" in parent.data.metrics
    assert parent.data.metrics["autoencoder/loss"] == 0.25
    found = table()
    assert found.groupby(level=0, sort=False).size().to_dict() == {
        "original": 11,
        "heldout": 1,
        "generated": 3,
        "average": 1,
        "first_only": 1,
    }
    weights = load_file(artifacts(runs("generate")[0]) / "generated.safetensors")["1.weight"]
    assert found.loc["generated", "loudness"].tolist() == pytest.approx(weights.flatten(1).abs().mean(1).tolist())
    assert parent.data.metrics["loudness/first_only_mean"] == pytest.approx(found.loc["original", "loudness"].iloc[0])
    assert found.loc["original", "nearest_distance"].nunique() > 1
    assert "first_only" in capsys.readouterr().out


@pytest.mark.slow
def test_a_generator_and_an_evaluator(registered, capfd):
    words = ["--generator.kind", "copies", "--generator.factor", "0.5", "--evaluate.kind", "fair"]
    assert pdiff(["main", "--tag", "toy.yaml", *words, "--evaluate.accuracy", "0.75"]) == 0
    (parent,) = runs("main")
    assert parent.data.metrics["test_accuracy/generated_mean"] == 0.75
    sampled = load_file(artifacts(runs("generate")[0]) / "generated.safetensors")["1.bias"]
    assert torch.equal(sampled, sampled[:1].expand(3, -1))
    (biases,) = runs("biases")
    assert biases.info.status == "FINISHED" and (artifacts(biases) / "biases.txt").read_text() == str(sampled.tolist())
    assert parent.data.metrics["largest_bias"] == pytest.approx(sampled.abs().max().item())
    assert pdiff(["main", "--tag", "toy.yaml", *words, "--evaluate.accuracy", "0.75"]) == 0
    assert len(runs("biases")) == 1, "it is reused like every other stage"
    assert "generator" in {model.name for model in mlflow.search_logged_models(output_format="list")}
    assert pdiff(["main", "--tag", "toy.yaml", *words, "--generate.sampler", "heun"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert (
        "generate.sampler: belongs to generator.kind latent_diffusion or neurons, but generator.kind is copies" in line
    )
    assert pdiff(["main", "--tag", "toy.yaml", *words, "--generator.scale", "1"]) == 2
    assert "generator.scale: belongs to kind gaussian, but kind is copies" in capfd.readouterr().err.splitlines()[-1]
