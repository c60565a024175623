"""Options of data sets, networks and populations of checkpoints, as sections of a configuration.

They lie apart from what they configure (`datasets`, `architectures`, `populations`), because a configuration is read
and checked without importing torch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pdiff.method.options import (
    NonNegative,
    Optimization,
    Place,
    Positive,
    Rate,
    Section,
    Seed,
    Several,
    without_effect,
)


class Dataset(Section):
    """Labelled images, split into a training, a validation and a test part.

    `name` is one of DATASETS, `root` the folder that holds it (default: the environment variable PDIFF_DATA, else
    ~/.cache/pdiff/datasets), `download` whether it may be downloaded. `image_size` is the side of the preprocessed
    images, 0 for that of the raw ones; `resize` the shorter side before the centre crop, 0 for `image_size`; `channels`
    repeats grey (3) or decodes files as grey (1), 0 leaves them; `augment` trains on random resized crops and flips;
    `mean` and `std` normalise, one number or one a channel. `validation_fraction` of the training images, split off
    with `split_seed`, are never trained on.
    """

    name: str
    root: Place = without_effect("")
    download: bool = without_effect(True)
    image_size: Annotated[int, Field(ge=0, le=1024)] = 0
    resize: Annotated[int, Field(ge=0, le=1024)] = 0
    channels: Literal[0, 1, 3] = 0
    augment: bool = False
    mean: Annotated[tuple[float, ...], Several] = (0.5,)
    std: Annotated[tuple[Rate, ...], Several] = (0.5,)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: Seed = 0


class Network(Section):
    """The classifier whose weights are generated: `architecture` is a name of ARCHITECTURES or of timm, or
    `path/to/file.py:function`; `pretrained` starts from timm's weights, or from those in the file `weights`."""

    architecture: str
    pretrained: bool = False
    weights: Place = ""

    @model_validator(mode="after")
    def _check(self) -> Network:
        if self.weights and not self.pretrained:
            raise ValueError("weights needs pretrained: true")
        return self


class Pretrain(Optimization):
    """Training for `epochs` before checkpoints are collected, 0 for none; the weights of the epoch with the best
    validation accuracy are kept."""

    epochs: Annotated[int, Field(ge=0)] = 10
    learning_rate: Rate = 1e-3
    weight_decay: NonNegative = 1e-4


class CollectOptions(Optimization):
    """Options of one way to collect checkpoints.

    Attributes:
        pretrains: whether a network is pretrained first.
        counts: the keys that decide how many checkpoints there will be.
    """

    pretrains: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]]

    @property
    def total(self) -> int:
        """How many checkpoints there will be."""
        raise NotImplementedError


class TrajectoryOptions(CollectOptions):
    """Steps of one run: the generated parameters of the pretrained network are fine-tuned, and a checkpoint is taken
    every `every_steps` steps until there are `checkpoints`; `every_steps: auto` spreads them over one epoch."""

    counts: ClassVar[tuple[str, ...]] = ("checkpoints",)

    learning_rate: Rate = 0.03
    weight_decay: NonNegative = 5e-4
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    checkpoints: Annotated[int, Field(ge=2)] = 300
    every_steps: Positive | Literal["auto"] = 1

    @property
    def total(self) -> int:
        return self.checkpoints


class RunsOptions(CollectOptions):
    """Several `networks`, each trained for `steps` steps, or for `epochs` where `steps` is 0, on batches in an order of
    its own; of each the last `snapshots` of evenly spaced checkpoints are taken, which end with the last step."""

    counts: ClassVar[tuple[str, ...]] = ("networks", "snapshots")

    networks: Annotated[int, Field(ge=2)] = 100
    steps: Annotated[int, Field(ge=0)] = 0
    epochs: Positive = 20
    snapshots: Positive = 1
    batch_size: Positive = 64

    @property
    def total(self) -> int:
        return self.networks * self.snapshots

    @model_validator(mode="after")
    def _check_snapshots(self) -> RunsOptions:
        if self.steps and self.snapshots > self.steps:
            raise ValueError(f"snapshots <= steps must hold, but got ({self.snapshots}, {self.steps})")
        return self


class SeedsOptions(RunsOptions):
    """Networks from independent seeds: each has its own initialisation, and nothing is pretrained."""

    pretrains: ClassVar[bool] = False

    learning_rate: Rate = 1e-2
    schedule: Literal["constant", "cosine", "one_cycle"] = "one_cycle"


class BranchesOptions(RunsOptions):
    """Branches of one trunk: each network starts as the pretrained one, of which the generated parameters go on."""

    learning_rate: Rate = 3e-3


COLLECTORS: dict[str, type[CollectOptions]] = {
    "trajectory": TrajectoryOptions,
    "seeds": SeedsOptions,
    "branches": BranchesOptions,
}
"""The ways to collect checkpoints; see `populations`."""
