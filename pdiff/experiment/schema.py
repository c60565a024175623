"""The schema of an experiment: its sections, their defaults and their bounds. Nothing here reads a file."""

from __future__ import annotations

import re
import shlex
import warnings
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from pdiff.method.options import (
    SAMPLERS_OF,
    Autoencoder,
    DiffusionSettings,
    NonNegative,
    Positive,
    Section,
    Seed,
    Several,
    neutral,
)
from pdiff.networks.options import Collect, Dataset, Network, Pretrain

warnings.filterwarnings("ignore", message='Field name "register"')  # hides ABCMeta.register, which nobody calls here


class Prepare(Section):
    """Where the collection comes from: `parameters` are names or patterns of what is generated, or "all";
    `source` is a folder of somebody's checkpoint files instead of training, `exclude` names or patterns of files
    there that are left out."""

    parameters: Annotated[tuple[str, ...], Several] = ("all",)
    source: str = ""
    exclude: Annotated[tuple[str, ...], Several] = ()
    pretrain: Pretrain = Pretrain()
    collect: Collect = Collect()


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
