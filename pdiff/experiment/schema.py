"""The schema of an experiment: sections composed of the options that stand beside what they configure.

Some keys choose an entry of a registry, such as `autoencoder.kind`; the section then has the options of that entry, and
those of no other. Nothing here reads a file or imports torch.
"""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, Field, create_model, model_validator

from pdiff.method.autoencoders import AUTOENCODERS
from pdiff.method.baselines import BASELINES
from pdiff.method.denoisers import DENOISERS
from pdiff.method.generators import GENERATORS, DiffusionOptions, GeneratorOptions
from pdiff.method.objectives import OBJECTIVES
from pdiff.method.options import NonNegative, Positive, Section, Seed, Several, without_effect
from pdiff.method.samplers import samplers_of
from pdiff.networks.options import Collect, Dataset, Network, Pretrain

warnings.filterwarnings("ignore", message='Field name "register"')  # hides ABCMeta.register, which nobody calls here

Tree = dict[str, Any]


class Prepare(Section):
    """Where the collection comes from: `parameters` are names or patterns of what is generated, or "all";
    `source` is a folder of existing checkpoint files instead of training, `exclude` names or patterns of files
    there that are left out."""

    parameters: Annotated[tuple[str, ...], Several] = ("all",)
    source: str = ""
    exclude: Annotated[tuple[str, ...], Several] = ()
    pretrain: Pretrain = Pretrain()
    collect: Collect = Collect()


class GeneratorSection(Section):
    """Which generator is fitted, on the first `checkpoints` of the collection, 0 for all."""

    kind: str = "latent_diffusion"
    checkpoints: Annotated[int, Field(ge=0)] = 0


class AutoencoderSection(Section):
    """Vectors <-> latents. Reconstructed networks may lose `max_accuracy_drop` of validation accuracy; what happens
    when they lose more is `on_accuracy_drop`."""

    kind: str = "pca"
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] = 0.02
    on_accuracy_drop: Literal["warn", "stop"] = "warn"


class DiffusionSection(DiffusionOptions):
    """Latent diffusion: the training of a `denoiser` that learns a `prediction`."""

    denoiser: str = "mlp"
    prediction: str = "flow"


class Generate(Section):
    """How many networks are sampled; `batch_size` at a time."""

    count: Positive = 200
    seed: Seed = 0
    batch_size: Positive = without_effect(64)


class Evaluate(Section):
    """What generated networks are compared with: noise on `noise_count` originals at every scale of `noise`, and the
    baselines. `test: false` measures on validation images alone.

    Networks of an unknown data set or architecture are evaluated by `function`, `path/to/file.py:function` that
    predicts, or by `command`, which prints an accuracy that `pattern` finds, for the file `{checkpoint}`; run in
    `folder`, so many at a time as `workers` says, 0 for as many as there are cores.
    """

    noise: Annotated[tuple[NonNegative, ...], Several] = (0.001, 0.05, 0.15)
    noise_count: Positive = 300
    baselines: Annotated[tuple[str, ...], Several] = ("average",)
    test: bool = True
    function: str = ""
    command: str = ""
    pattern: str = r"(?i)acc(?!\w*[2-9])\w*(?:@1)?(?!@)\W*?(\d*\.?\d+(?:e[-+]?\d+)?\s*%?)"
    folder: str = ""
    workers: Annotated[int, Field(ge=0)] = without_effect(0)
    batch_size: Positive = without_effect(500)

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if len({f"{scale:g}" for scale in self.noise}) < len(self.noise):
            raise ValueError(f"noise holds a scale twice: {list(self.noise)}")
        if unknown := [name for name in self.baselines if name not in BASELINES]:
            raise ValueError(f"baselines: unknown {unknown[0]!r}, expected some of {', '.join(BASELINES)}")
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
    """Everything that one tag stands for; without `dataset` and `network`, networks that pdiff cannot run itself.

    `processes` share the training and the evaluation on this machine, each with its GPU where there are GPUs; the
    result is that of one process. The sections that depend on a choice are added by `composed`.
    """

    tag: str = without_effect("")
    seed: Seed = 0
    device: str = without_effect("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    processes: Positive = without_effect(1)
    register: bool = without_effect(False)
    log_models: bool = without_effect(True)
    dataset: Dataset | None = None
    network: Network | None = None
    prepare: Prepare = Prepare()

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        missing = [name for name in ("dataset", "network") if getattr(self, name) is None]
        if missing and not (self.prepare.source and len(missing) == 2):
            raise ValueError(f"{' and '.join(missing)}: is missing; only prepare.source can do without both")
        trained = {"prepare.pretrain": self.prepare.pretrain, "prepare.collect": self.prepare.collect}
        trained |= {name: getattr(self, name) for name in GENERATORS[self.generator.kind].sections}
        for name, section in trained.items():
            batch_size = getattr(section, "batch_size", self.processes)
            if batch_size < self.processes:
                raise ValueError(f"processes <= {name}.batch_size must hold, but got ({self.processes}, {batch_size})")
        if hasattr(self.generate, "sampler"):
            self._check_sampling()
        return self

    def _check_sampling(self) -> None:
        prediction, generate = self.diffusion.prediction, self.generate
        allowed = samplers_of(OBJECTIVES[prediction])
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

    def __reduce__(self) -> tuple:
        return experiment, (self.model_dump(),)  # the composed class cannot be imported by name

    @property
    def generator_options(self) -> GeneratorOptions:
        """The options of the generator that is fitted."""
        kind = GENERATORS[self.generator.kind]
        return kind.of(self.generator, **{name: getattr(self, name) for name in kind.sections})

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of one sampling from the generator."""
        return self.generate.part(GENERATORS[self.generator.kind].sampling).model_dump()


class Choice(NamedTuple):
    """A key whose value chooses an entry of a registry, whose options its section then has."""

    section: str
    key: str
    registry: Mapping[str, type[Section]]
    base: type[Section]

    @property
    def name(self) -> str:
        """The dotted key."""
        return f"{self.section}.{self.key}"

    def value(self, tree: Tree) -> str:
        """The entry that a configuration chooses; the default one where it chooses none that exists."""
        section = tree.get(self.section)
        chosen = section.get(self.key) if isinstance(section, dict) else None
        known = isinstance(chosen, str) and chosen in self.registry
        return chosen if known else self.base.model_fields[self.key].default


CHOICES = (
    Choice("generator", "kind", GENERATORS, GeneratorSection),
    Choice("autoencoder", "kind", AUTOENCODERS, AutoencoderSection),
    Choice("diffusion", "denoiser", DENOISERS, DiffusionSection),
    Choice("diffusion", "prediction", OBJECTIVES, DiffusionSection),
)
ORDER = ("generator", "autoencoder", "diffusion", "generate")
BASES: dict[str, type[Section]] = {**{choice.section: choice.base for choice in CHOICES}, "generate": Generate}


def experiment(tree: Tree) -> Experiment:
    """The experiment of a configuration.

    Raises:
        pydantic.ValidationError: what is wrong with it.
    """
    return composed(chosen(tree)).model_validate(tree)


def chosen(tree: Tree) -> tuple[str, ...]:
    """What a configuration chooses, in the order of `CHOICES`."""
    return tuple(choice.value(tree) for choice in CHOICES)


def composed(kinds: tuple[str, ...]) -> type[Experiment]:
    """The schema of experiments that make some choices."""
    return _composed(tuple(choice.registry[kind] for choice, kind in zip(CHOICES, kinds, strict=True)))


@lru_cache
def _composed(options: tuple[type[Section], ...]) -> type[Experiment]:
    generator = options[0]
    parts: dict[str, list[type[Section]]] = {"generator": [], "generate": [generator.sampling, *generator.extras]}
    if not generator.sections:
        parts["generator"] = [generator]
    for choice, option in zip(CHOICES[1:], options[1:], strict=True):
        if choice.section in generator.sections:
            parts.setdefault(choice.section, []).append(option)
    sections: dict[str, Any] = {}
    for name, mixed in parts.items():
        keys = {c.key: (Literal[tuple(c.registry)], c.value({})) for c in CHOICES if c.section == name}
        section = create_model(BASES[name].__name__, __base__=(BASES[name], *mixed), __module__=__name__, **keys)
        sections[name] = (section, Field(default_factory=section))
    sections = {name: sections[name] for name in ORDER if name in sections} | {"evaluate": (Evaluate, Evaluate())}
    sections["register"] = (bool, Experiment.model_fields["register"])  # or pydantic would find ABCMeta.register
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message='Field name "register"')
        return create_model("Experiment", __base__=Experiment, __module__=__name__, **sections)


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of a schema, with those of its sections: dataset, dataset.name, ..."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or one that may be absent
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


def belongs_to(key: str) -> list[tuple[Choice, str]]:
    """The choices that bring a dotted key, and which of their entries do."""
    default, found = chosen({}), []
    for k, choice in enumerate(CHOICES):
        for kind in choice.registry:
            kinds = (*default[:k], kind, *default[k + 1 :])
            without = [(*default[:k], other, *default[k + 1 :]) for other in choice.registry if other != kind]
            if key in known_keys(composed(kinds)) and any(key not in known_keys(composed(w)) for w in without):
                found.append((choice, kind))
    return found


def all_keys() -> list[str]:
    """Every key that some experiment can have."""
    default = chosen({})
    models = [composed(default)]
    for k, choice in enumerate(CHOICES):
        models += [composed((*default[:k], kind, *default[k + 1 :])) for kind in choice.registry]
    return list(dict.fromkeys(key for model in models for key in known_keys(model)))


def without_stale(base: Tree, top: Tree) -> Tree:
    """A configuration without the options of the entries that another layer on top of it replaces.

    A layer that says `autoencoder.kind: pca` does not inherit the options of kind conv.
    """
    overlaid = {c.section: {**_section(base, c.section), **_section(top, c.section)} for c in CHOICES}
    before, after = chosen(base), chosen(overlaid)
    if before == after:
        return base
    stale = set(known_keys(composed(before))) - set(known_keys(composed(after)))
    kept = {name: value for name, value in base.items() if name not in stale}
    return {
        name: {k: v for k, v in value.items() if f"{name}.{k}" not in stale} if isinstance(value, dict) else value
        for name, value in kept.items()
    }


def _section(tree: Tree, name: str) -> Tree:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}


def affecting(section: BaseModel) -> dict[str, Any]:
    """A section as plain data, without what cannot change a result."""
    values = {}
    for name, field in type(section).model_fields.items():
        if (field.json_schema_extra or {}).get("affects_result", True):  # type: ignore[union-attr]
            value = getattr(section, name)
            values[name] = affecting(value) if isinstance(value, BaseModel) else value
    return values
