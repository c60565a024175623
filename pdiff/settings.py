"""The schema of an experiment: its sections, their defaults and their bounds. Nothing here reads a file."""

from __future__ import annotations

import re
import shlex
import warnings
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pdiff.diffusion import SAMPLERS_OF

warnings.filterwarnings("ignore", message='Field name "register"')  # hides ABCMeta.register, which nobody calls here

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Several = BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,))  # one is several, too
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def neutral(default: Any, **options: Any) -> Any:
    """A field that cannot change a result (a place, a device, a batch size of inference): not part of any digest."""
    return Field(default, json_schema_extra={"neutral": True}, **options)


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Optimization(Section):
    """How something is trained. `one_cycle` also cycles the momentum (Adam's first beta), as PyTorch's does;
    `final_learning_rate` is where `cosine` ends."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Rate = 1e-3
    weight_decay: NonNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    final_learning_rate: NonNegative = 0.0
    batch_size: Positive = 128


class Dataset(Section):
    """Images and their labels, split into train, validation and test.

    `image_size` is the side to which images are brought, 0 for their own; `resize` the side before the centre crop,
    0 for none; `augment` draws random resized crops and flips for training; `validation_fraction` of the training
    images, split off with `split_seed`, are never trained on.
    """

    name: str
    root: str = neutral("")
    download: bool = neutral(True)
    image_size: Annotated[int, Field(ge=0, le=1024)] = 0
    resize: Annotated[int, Field(ge=0, le=1024)] = 0
    channels: Literal[0, 1, 3] = 0
    augment: bool = False
    mean: Annotated[tuple[float, ...], Several] = (0.5,)
    std: Annotated[tuple[Rate, ...], Several] = (0.5,)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: Seed = 0


class Network(Section):
    """The classifier whose weights are generated: `architecture` is a name (`pdiff.architectures`, timm's) or
    `path/to/file.py:function`; `pretrained` takes timm's weights, or those in the file `weights`."""

    architecture: str
    pretrained: bool = False
    weights: str = ""

    @model_validator(mode="after")
    def _check(self) -> Network:
        if self.weights and not self.pretrained:
            raise ValueError("weights needs pretrained: true")
        return self


class Pretrain(Optimization):
    """Training before checkpoints are collected; the epoch with the best validation accuracy is kept."""

    epochs: Annotated[int, Field(ge=0)] = 10
    learning_rate: Rate = 1e-3
    weight_decay: NonNegative = 1e-4


class Collect(Optimization):
    """Fine-tuning of the generated parameters, saved every few steps until there are enough checkpoints;
    `every_steps: auto` spreads them over one epoch."""

    learning_rate: Rate = 0.03
    weight_decay: NonNegative = 5e-4
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    checkpoints: Annotated[int, Field(ge=2)] = 300
    every_steps: Positive | Literal["auto"] = 1


class Prepare(Section):
    """Where the collection comes from: `parameters` are names or patterns of what is generated, or "all";
    `source` is a folder of somebody's checkpoint files instead of training, `exclude` names or patterns of files
    there that are left out."""

    parameters: Annotated[tuple[str, ...], Several] = ("all",)
    source: str = ""
    exclude: Annotated[tuple[str, ...], Several] = ()
    pretrain: Pretrain = Pretrain()
    collect: Collect = Collect()


class Autoencoder(Optimization):
    """Vectors <-> latents, fitted on the first `checkpoints` of the collection, 0 for all. The fields of training
    concern `conv` alone, `variance` the automatic size of `pca`; `kl_weight` > 0 makes `conv` variational."""

    checkpoints: Annotated[int, Field(ge=0)] = 0
    kind: Literal["pca", "conv"] = "pca"
    latent_size: Positive | Literal["auto"] = "auto"
    variance: Annotated[float, Field(gt=0, le=1)] = 0.999
    parameter_noise: NonNegative = 0.001
    latent_noise: NonNegative = 0.1
    kl_weight: NonNegative = 0.0
    steps: Positive = 500
    learning_rate: Rate = 2e-5
    batch_size: Positive = 50
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] = 0.02
    on_accuracy_drop: Literal["warn", "stop"] = "warn"

    @model_validator(mode="after")
    def _check(self) -> Autoencoder:
        if self.kind == "conv" and self.latent_size == "auto":
            raise ValueError("latent_size 'auto' needs kind pca; kind conv needs a number, such as 128")
        return self


class DiffusionSettings(Optimization):
    """Latent diffusion; with `steps` 0 there is none, and latents are drawn from a Gaussian.

    `heldout_fraction` of the checkpoints is kept from the fit; with `patience` > 0 training stops after as many
    evaluations of their loss (every `evaluate_every` steps) without a better one, and keeps the best.
    """

    denoiser: Literal["mlp", "conv"] = "mlp"
    width: Positive = 256
    blocks: Positive = 3
    prediction: Literal["flow", "epsilon", "sample", "v_prediction"] = "flow"
    timesteps: Positive = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    standardize_latents: bool = True
    steps: Annotated[int, Field(ge=0)] = 1000
    learning_rate: Rate = 1e-3
    schedule: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    batch_size: Positive = 128
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    evaluate_every: Positive = 50
    patience: Annotated[int, Field(ge=0)] = 8

    @model_validator(mode="after")
    def _check(self) -> DiffusionSettings:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start <= beta_end must hold, but got ({self.beta_start}, {self.beta_end})")
        if self.patience and not self.heldout_fraction:
            raise ValueError("patience > 0 needs heldout_fraction > 0: early stopping watches held-out checkpoints")
        return self


class Generate(Section):
    """How networks are drawn. `sampler: auto` takes the first that follows the prediction; `sampling_steps` are
    denoiser calls, 0 for all timesteps. With `trajectory_every` > 0 the first `trajectory_count` draws are also kept
    as they are after every so many calls."""

    count: Positive = 200
    sampler: Literal["auto", "ddpm", "ddim", "dpmsolver++", "euler", "heun"] = "auto"
    sampling_steps: Annotated[int, Field(ge=0)] = 20
    seed: Seed = 0
    trajectory_every: Annotated[int, Field(ge=0)] = 0
    trajectory_count: Positive = 16
    batch_size: Positive = neutral(64)


class Evaluate(Section):
    """What generated networks are compared with: noise on `noise_count` originals at every scale of `noise`, and the
    baselines. `test: false` measures on validation images alone.

    Networks of a data set or an architecture of somebody's own are evaluated by `function`, `path/to/file.py:function`
    that predicts, or by `command`, which prints an accuracy that `pattern` finds, for the file `{checkpoint}`; run in
    `folder`, so many at a time as `workers` says, 0 for as many as there are cores.
    """

    noise: Annotated[tuple[NonNegative, ...], Several] = (0.001, 0.05, 0.15)
    noise_count: Positive = 300
    baselines: Annotated[tuple[Literal["average"], ...], Several] = ("average",)
    test: bool = True
    function: str = ""
    command: str = ""
    pattern: str = r"(?i)acc(?!\w*[2-9])\w*(?:@1)?(?!@)\W*?(\d*\.?\d+(?:e[-+]?\d+)?\s*%?)"
    folder: str = ""
    workers: Annotated[int, Field(ge=0)] = neutral(0)
    batch_size: Positive = neutral(500)

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if len({f"{scale:g}" for scale in self.noise}) < len(self.noise):
            raise ValueError(f"noise holds a scale twice: {list(self.noise)}")
        if self.function and self.command:
            raise ValueError("function and command exclude each other")
        if self.command and "{checkpoint}" not in self.command:
            raise ValueError(f"command must hold {{checkpoint}}, but got {self.command!r}")
        if not self.test and (self.function or self.command):
            raise ValueError("test: false cannot hold for a function or a command: they alone know their images")
        try:
            shlex.split(self.command)
        except ValueError as error:
            raise ValueError(f"command {self.command!r} cannot be split into words: {error}") from None
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"pattern {self.pattern!r} has {groups} groups, expected one: the accuracy")
        return self


class Experiment(Section):
    """Everything that one tag stands for; without `dataset` and `network`, networks that only their owner knows.

    `processes` share the training and the evaluation on this machine, each with a GPU of its own where there are GPUs;
    the result is that of one.
    """

    tag: str = neutral("")
    seed: Seed = 0
    device: str = neutral("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    processes: Positive = neutral(1)
    register: bool = neutral(False)
    log_models: bool = neutral(True)
    dataset: Dataset | None = None
    network: Network | None = None
    prepare: Prepare = Prepare()
    autoencoder: Autoencoder = Autoencoder()
    diffusion: DiffusionSettings = DiffusionSettings()
    generate: Generate = Generate()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        missing = [name for name in ("dataset", "network") if getattr(self, name) is None]
        if missing and not (self.prepare.source and len(missing) == 2):
            raise ValueError(f"{' and '.join(missing)}: is missing; only prepare.source can do without both")
        sections = (("prepare.pretrain", self.prepare.pretrain), ("prepare.collect", self.prepare.collect))
        for name, section in (*sections, ("autoencoder", self.autoencoder), ("diffusion", self.diffusion)):
            if section.batch_size < self.processes:
                raise ValueError(
                    f"processes <= {name}.batch_size must hold, but got ({self.processes}, {section.batch_size})"
                )
        prediction, generate = self.diffusion.prediction, self.generate
        allowed = SAMPLERS_OF[prediction]
        if generate.sampler not in ("auto", *allowed):
            raise ValueError(
                f"generate.sampler {generate.sampler!r} cannot follow diffusion.prediction {prediction!r}, "
                f"expected one of {', '.join(allowed)}"
            )
        if generate.sampling_steps > self.diffusion.timesteps:
            raise ValueError(
                f"generate.sampling_steps <= diffusion.timesteps must hold, "
                f"but got ({generate.sampling_steps}, {self.diffusion.timesteps})"
            )
        return self

    @property
    def sampler(self) -> str:
        """The sampler, `auto` resolved."""
        automatic = SAMPLERS_OF[self.diffusion.prediction][0]
        return automatic if self.generate.sampler == "auto" else self.generate.sampler

    @property
    def sampling_steps(self) -> int:
        """Denoiser calls of a draw, 0 resolved."""
        return self.generate.sampling_steps or self.diffusion.timesteps


def without_neutral(section: BaseModel) -> dict[str, Any]:
    """A section as plain data, without what cannot change a result."""
    fields = type(section).model_fields.items()
    kept = [n for n, field in fields if not (field.json_schema_extra or {}).get("neutral")]  # type: ignore[union-attr]
    values = {name: getattr(section, name) for name in kept}
    return {n: without_neutral(v) if isinstance(v, BaseModel) else v for n, v in values.items()}
