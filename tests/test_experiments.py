"""The experiments of this repository: all load, and the paper's has the paper's settings."""

from pathlib import Path

import pytest
import torch

from pdiff import config
from pdiff.architectures import build
from pdiff.checkpoints import generated_names
from pdiff.weights import is_generated

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = [path for path in sorted(FOLDER.rglob("*.yaml")) if path.parent.name != "sweeps"]
TAGS = [path.stem for path in FILES if path.parent != FOLDER]  # what lies in the folder itself is for `extends` alone


def generated(tag: str, **sizes: int) -> int:
    """Numbers that an experiment generates, of its network."""
    experiment = config.load(tag)
    with torch.device("meta"):
        network = build(experiment.network.architecture, pretrained=False, **sizes)
    state = network.state_dict()
    names = generated_names(network, experiment.prepare.parameters)
    return sum(state[name].numel() for name in names if is_generated(name, state[name]))


def test_names_are_unique_and_known():
    assert len({path.stem for path in FILES}) == len(FILES)
    assert set(config.tags()) >= {path.stem for path in FILES}
    assert {"digits_mlp", "cifar100_resnet18"} <= set(TAGS)


@pytest.mark.parametrize("tag", TAGS)
def test_loads(tag):
    experiment = config.load(tag)
    assert experiment.tag == tag
    assert experiment.dataset.validation_fraction > 0  # choices are made on it, never on test images


@pytest.mark.parametrize("tag", [tag for tag in TAGS if tag.endswith("_paper")])
def test_paper_variants_share_their_checkpoints(tag):
    sections = ("dataset", "network", "prepare")
    ours, papers = (config.load(t) for t in (tag.removesuffix("_paper"), tag))
    assert config.digest(ours, sections) == config.digest(papers, sections)
    assert papers.autoencoder == config.load("cifar100_resnet18").autoencoder
    assert papers.diffusion == config.load("cifar100_resnet18").diffusion
    assert papers.generate == config.load("cifar100_resnet18").generate


def test_the_papers_main_experiment():
    experiment = config.load("cifar100_resnet18")

    def values(section: object, keys: str) -> list:
        return [getattr(section, key) for key in keys.split()]

    training = "optimizer learning_rate weight_decay schedule batch_size"
    pretrain, collect = experiment.prepare.pretrain, experiment.prepare.collect
    assert values(pretrain, f"{training} epochs") == ["adamw", 5e-4, 5e-4, "cosine", 128, 10]
    assert values(collect, f"{training} checkpoints every_steps") == ["adamw", 0.03, 5e-4, "constant", 128, 300, 1]
    autoencoder = experiment.autoencoder
    assert values(autoencoder, f"{training} steps") == ["adamw", 2e-5, 0, "cosine", 50, 500]
    keys = "kind latent_size parameter_noise latent_noise kl_weight"
    assert values(autoencoder, keys) == ["conv", 128, 0.001, 0.1, 0]
    diffusion = experiment.diffusion
    assert values(diffusion, f"{training} steps") == ["adamw", 1e-4, 0, "cosine", 50, 1000]
    keys = "denoiser prediction timesteps beta_start beta_end ema patience standardize_latents"
    assert values(diffusion, keys) == ["conv", "epsilon", 1000, 1e-4, 0.02, 0, 0, False]
    assert values(experiment, "sampler sampling_steps") == ["ddpm", 1000]
    assert values(experiment.generate, "count") == [200]
    assert values(experiment.evaluate, "noise noise_count") == [(0.001, 0.05, 0.15), 300]
    assert values(experiment.dataset, "name image_size resize") == ["cifar100", 224, 256]
    assert values(experiment.network, "architecture pretrained") == ["resnet18", True]


@pytest.mark.parametrize(
    ("tag", "classes", "channels", "image_size", "count"),
    [
        ("cifar100_resnet18", 100, 3, 224, 4 * 512),
        ("fashion_resnet18", 10, 3, 32, 4 * 512),
        ("fashion_cnn", 10, 3, 32, 10853),
        ("digits_mlp", 10, 1, 8, 2410),
        ("digits_cnn", 10, 1, 8, 1946 + 48),
    ],
)
def test_what_is_generated(tag, classes, channels, image_size, count):
    assert generated(tag, classes=classes, channels=channels, image_size=image_size) == count
