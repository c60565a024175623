"""The experiments of this repository: all load, and the 81 of the paper have the settings that were published."""

import csv
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

from pdiff.experiment import config, published, stages
from pdiff.experiment.schema import Experiment
from pdiff.method.autoencoders import convolutional
from pdiff.method.denoisers import convolutional as convolutional_denoiser
from pdiff.method.options import Optimization
from pdiff.networks.architectures import build
from pdiff.networks.datasets import DATASETS
from pdiff.networks.populations import generated_names, generated_size

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = [path for path in sorted(FOLDER.rglob("*.yaml")) if path.parent.name != "sweeps"]
TAGS = [path.stem for path in FILES if path.parent != FOLDER]  # what lies in the folder itself is for `extends` alone
PUBLISHED = json.loads((Path(__file__).parents[1] / "helpers" / "tags.json").read_text())
FACTS = PUBLISHED["tags"]


def test_names_are_unique_and_known():
    assert len({path.stem for path in FILES}) == len(FILES)
    assert set(config.tags()) >= {path.stem for path in FILES}
    assert {"digits_mlp", *FACTS} <= set(TAGS)
    assert {path.stem for path in FILES if path.parent.name in ("main", "full", "ablation")} == set(FACTS)


@pytest.mark.parametrize("tag", TAGS)
def test_loads(tag):
    experiment = config.load(tag)
    assert experiment.tag == tag
    assert experiment.dataset.validation_fraction > 0  # choices are made on it, never on test images


@pytest.mark.parametrize("tag", [tag for tag in TAGS if tag.endswith("_paper")])
def test_paper_variants_share_their_checkpoints(tag):
    ours, papers = (config.load(t) for t in (tag.removesuffix("_paper"), tag))
    assert stages.all_digests(ours)["prepare"] == stages.all_digests(papers)["prepare"]
    assert papers.autoencoder == config.load("cifar100_resnet18").autoencoder
    assert papers.diffusion == config.load("cifar100_resnet18").diffusion
    assert papers.generate == config.load("cifar100_resnet18").generate


# -- what was published: every fact has a check, and a fact without one is an error

DATA_SETS = {
    "CIFAR10": "cifar10",
    "CIFAR100": "cifar100",
    "Flowers102": "flowers102",
    "Food101": "food101",
    "ImageFolder (ImageNet-1k train/val)": "imagenet",
    "MNIST": "mnist",
    "OxfordIIITPet": "pets",
    "STL10": "stl10",
    "SVHN": "svhn",
}
SMALL = {
    "cnnmedium": "cnn_medium",
    **{name: f"{name}_mini" for name in ("mlp", "convnet", "resnet", "vit", "convnext")},
}
UNMAPPED = {"seed", "precision"}  # of the reference: ours come from `seed`, and bfloat16 is for CUDA alone


def merged(facts: dict, section: str) -> dict:
    """A section of a tag's facts over the defaults; that of another tag where the facts say so."""
    origin = facts
    if section == "collect" and "checkpoints_from" in facts:
        origin = FACTS[facts["checkpoints_from"]]
    if section == "pretrain" and facts.get("pretrain") is None and facts["dataset"] == "CIFAR100":
        origin = FACTS["cifar100_resnet18"]  # checkpoints_from, pretrained_from, and numberckpt_400
    own = origin[section]
    if section == "pretrain" and own is None:
        own = {"epochs": 0}  # the weights that a network comes with
    return {**PUBLISHED["defaults"][section], **own}


def transforms_of(experiment: Experiment) -> dict[str, list[str]]:
    """The transforms of a data set, as torchvision would write them."""
    data = experiment.dataset
    channels = max(len(data.mean), 1 if data.name == "mnist" else 3)
    mean, std = (tuple(values) * (channels // len(values)) for values in (data.mean, data.std))
    normalised = ["ToTensor()", f"Normalize({mean}, {std})"]
    train = [f"RandomResizedCrop({data.image_size})", "RandomHorizontalFlip()"] if data.augment else []
    test = [f"Resize({data.resize or data.image_size})", f"CenterCrop({data.image_size})"]
    return {"train": train + normalised, "test": test + normalised}


OPTIMISATION = {"optimizer", "learning_rate", "weight_decay", "momentum", "batch_size"}


def check_optimisation(settings: Optimization, facts: dict) -> None:
    assert settings.optimizer == facts["optimizer"].lower()
    assert settings.learning_rate == facts["learning_rate"]
    assert settings.weight_decay == facts["weight_decay"]
    assert settings.momentum == facts.get("momentum", 0.9)
    assert settings.batch_size == facts["batch_size"]


def check_pretrain(experiment: Experiment, facts: dict) -> None:
    settings, expected = experiment.prepare.pretrain, merged(facts, "pretrain")
    assert settings.epochs == expected["epochs"]
    assert experiment.network.pretrained == expected["from_imagenet_weights"]
    if settings.epochs:
        assert settings.schedule == expected["schedule"] and settings.final_learning_rate == 0
        check_optimisation(settings, expected)
    assert set(expected) - OPTIMISATION - UNMAPPED == {"epochs", "from_imagenet_weights", "schedule"}


def check_collect(experiment: Experiment, facts: dict) -> None:
    settings, expected = experiment.prepare.collect, merged(facts, "collect")
    check_optimisation(settings, expected)
    assert settings.checkpoints == expected["checkpoints"]
    every = {"total_batches // checkpoints": "auto"}
    assert settings.every_steps == every.get(expected["every_steps"], expected["every_steps"])
    if expected["eta_min"] == expected["learning_rate"]:
        assert settings.schedule == "constant"
    else:
        assert (settings.schedule, settings.final_learning_rate) == ("cosine", expected["eta_min"])
    assert set(expected) - OPTIMISATION - UNMAPPED == {"checkpoints", "every_steps", "eta_min"}


def check_pdiff(experiment: Experiment, facts: dict) -> None:
    expected, autoencoder, diffusion = merged(facts, "pdiff"), experiment.autoencoder, experiment.diffusion
    found = {
        "ae_learning_rate": autoencoder.learning_rate,
        "ae_steps": autoencoder.steps,
        "latent_size": autoencoder.latent_size,
        "latent_noise": autoencoder.latent_noise,
        "parameter_noise": autoencoder.parameter_noise,
        "kl_weight": autoencoder.kl_weight,
        "diffusion_learning_rate": diffusion.learning_rate if diffusion.steps else None,
        "diffusion_steps": diffusion.steps,
        "beta": [diffusion.beta_start, diffusion.beta_end],
        "timesteps": diffusion.timesteps,
        "sampler": experiment.generate.sampler,
        "denoiser_channels": list(convolutional_denoiser.CHANNELS),
        "ae_channels": list(convolutional.ENCODER_CHANNELS[1:]),
        "kernel_size": convolutional.KERNEL_SIZE,
    }
    for key in ("batch_size", "weight_decay"):  # of both
        assert getattr(autoencoder, key) == getattr(diffusion, key)
        found[key] = getattr(autoencoder, key)
    assert found == expected and convolutional_denoiser.KERNEL_SIZE == convolutional.KERNEL_SIZE
    for settings in (autoencoder, diffusion):
        assert (settings.optimizer, settings.schedule, settings.final_learning_rate) == ("adamw", "cosine", 0)
    assert (autoencoder.kind, diffusion.denoiser, diffusion.prediction) == ("conv", "conv", "epsilon")
    assert (diffusion.ema, diffusion.stop_on, diffusion.heldout_fraction) == (0, "none", 0)
    assert not diffusion.standardize_latents
    assert (experiment.generate.sampling_steps or diffusion.timesteps) == diffusion.timesteps


@lru_cache
def shapes(architecture: str, image_size: int, classes: int = 10, channels: int = 3) -> nn.Module:
    """A network without numbers."""
    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    with torch.device("meta"):
        return build(architecture, pretrained=False, **sizes)


def check_generated(experiment: Experiment, facts: dict) -> None:
    """The patterns match the published names, in their order."""
    if facts["generated_parameters"] == "all":
        assert experiment.prepare.parameters == ("all",)
        return
    network = shapes(experiment.network.architecture, experiment.dataset.image_size)
    assert generated_names(network, experiment.prepare.parameters) == facts["generated_parameters"]


def check_used(experiment: Experiment, facts: dict) -> None:
    used = experiment.generator.checkpoints or experiment.prepare.collect.checkpoints
    assert used == facts.get("uses_first_checkpoints", experiment.prepare.collect.checkpoints)


def check_network(experiment: Experiment, facts: dict) -> None:
    assert experiment.network.architecture == facts.get("timm_model", SMALL.get(experiment.tag.split("_")[-1]))


def check_data(experiment: Experiment, facts: dict) -> None:
    assert experiment.dataset.name == DATA_SETS[facts["dataset"]]
    assert DATASETS[experiment.dataset.name].classes == facts["num_classes"]
    assert (experiment.dataset.channels or DATASETS[experiment.dataset.name].channels) == 3


def check_transforms(experiment: Experiment, facts: dict) -> None:
    assert transforms_of(experiment) == PUBLISHED["transforms"][facts["transforms"]]


def check_checkpoints_from(experiment: Experiment, facts: dict) -> None:
    base = config.load(facts.get("checkpoints_from", experiment.tag))
    assert stages.all_digests(experiment)["prepare"] == stages.all_digests(base)["prepare"]


def check_pretrained_from(experiment: Experiment, facts: dict) -> None:
    base = config.load(facts.get("pretrained_from", experiment.tag))
    assert (experiment.dataset, experiment.network, experiment.seed) == (base.dataset, base.network, base.seed)
    assert experiment.prepare.pretrain == base.prepare.pretrain


def check_category(experiment: Experiment, facts: dict) -> None:
    assert config.tags()[experiment.tag].parent.name == facts["category"]


CHECKS = {
    "category": check_category,
    "dataset": check_data,
    "num_classes": check_data,
    "timm_model": check_network,
    "generated_parameters": check_generated,
    "transforms": check_transforms,
    "collect": check_collect,
    "pretrain": check_pretrain,
    "pdiff": check_pdiff,
    "uses_first_checkpoints": check_used,
    "checkpoints_from": check_checkpoints_from,
    "pretrained_from": check_pretrained_from,
}
ELSEWHERE = {"published"}  # see test_published


@pytest.mark.slow
@pytest.mark.parametrize("tag", FACTS)
def test_settings_are_those_that_were_published(tag):
    experiment = config.load(tag)
    assert set(FACTS[tag]) - ELSEWHERE <= set(CHECKS)
    for check in dict.fromkeys(CHECKS.values()):
        check(experiment, FACTS[tag])


def test_the_facts_are_those_that_the_checks_know():
    assert len(FACTS) == 81
    assert set(PUBLISHED) == {"about", "defaults", "torchvision_splits", "transforms", "tags"}
    assert set(PUBLISHED["defaults"]) == {"collect", "pretrain", "pdiff"}
    assert set(PUBLISHED["torchvision_splits"]) == set(DATA_SETS)


@pytest.mark.slow
def test_tags_that_share_checkpoints_share_a_run_of_prepare():
    found = {tag: stages.all_digests(config.load(tag))["prepare"] for tag in FACTS}
    shared = {"cifar100_resnet18", *(tag for tag, facts in FACTS.items() if "checkpoints_from" in facts)}
    assert len(shared) == 17 and {found[tag] for tag in shared} == {found["cifar100_resnet18"]}
    assert len(set(found.values())) == 81 - 16  # and no other does


def test_published():
    """The numbers of the repository are those of the facts, under the names of our metrics."""
    for tag, facts in FACTS.items():
        expected = {}
        for name, value in facts.get("published", {}).items():
            if accuracy := re.fullmatch(r"(original|generated)_acc_(\w+)", name):
                expected[f"test_accuracy/{accuracy[1]}_{accuracy[2]}"] = value
            elif noise := re.fullmatch(r"noise=([\d.]+)_acc_mean", name):
                expected[f"test_accuracy/noise_{float(noise[1]):g}_mean"] = value
            elif name not in ("num_checkpoint", "num_generated"):
                groups = name.replace("-", "_").replace("(max)", "_max")
                expected[f"similarity/{groups}"] = value
        assert published.published(tag) == expected
    assert published.published("digits_mlp") == published.published("absent") == {}
    assert published.published("cifar100_resnet18")["similarity/original_generated_max"] == 0.8479


def test_published_counts():
    with (FOLDER / "published.csv").open() as file:
        rows = {row["tag"]: row for row in csv.DictReader(file)}
    assert set(rows) == {tag for tag, facts in FACTS.items() if "published" in facts}
    for tag, row in rows.items():
        counts = FACTS[tag]["published"]
        assert (float(row["checkpoints"]), float(row["generated"])) == (
            counts["num_checkpoint"],
            counts["num_generated"],
        )


@pytest.mark.parametrize(
    ("tag", "classes", "channels", "image_size", "count"),
    [
        ("cifar100_resnet18", 100, 3, 224, 4 * 512),
        ("layers_bn1013", 100, 3, 224, 8 * 256),
        ("layers_fc0000", 100, 3, 224, 100 * 512 + 100),
        ("stl10_vit", 10, 3, 64, 80714),
        ("fashion_resnet18", 10, 3, 32, 4 * 512),
        ("fashion_cnn", 10, 3, 32, 10853),
        ("digits_mlp", 10, 1, 8, 2410),
        ("digits_cnn", 10, 1, 8, 1946 + 48),
    ],
)
def test_what_is_generated(tag, classes, channels, image_size, count):
    experiment = config.load(tag)
    network = shapes(experiment.network.architecture, image_size, classes, channels)
    assert generated_size(network, experiment.prepare.parameters) == count
