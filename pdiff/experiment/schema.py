"""The schema of an experiment: sections composed of the options that stand beside what they configure.

Some keys choose an entry of a registry, such as `autoencoder.kind`; the section then has the options of that entry, and
those of no other. Nothing here reads a file or imports torch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field, create_model, field_validator, model_validator

from pdiff.experiment.metrics import CONTROLLED, family
from pdiff.method.autoencoders import AUTOENCODERS
from pdiff.method.baselines import BASELINES
from pdiff.method.denoisers import DENOISERS
from pdiff.method.generators import GENERATORS, DiffusionOptions, GeneratorOptions
from pdiff.method.objectives import OBJECTIVES
from pdiff.method.options import NonNegative, Place, Positive, Section, Seed, Several, without_effect
from pdiff.method.samplers import samplers_of
from pdiff.networks import evaluators
from pdiff.networks.evaluators import EVALUATORS, EvaluatorOptions
from pdiff.networks.imported import FORMATS
from pdiff.networks.imported.select import SourceSelect
from pdiff.networks.options import COLLECTORS, Dataset, Network, Pretrain

warnings.filterwarnings("ignore", message='Field name "register"')  # hides ABCMeta.register, which is never called here

Tree = dict[str, Any]


class Prepare(Section):
    """Where the collection comes from: `parameters` are names or patterns of what is generated, or "all";
    `source` is a folder of existing checkpoint files instead of training, `format` one of FORMATS that says what they
    are, `auto` for what they look like; `source_select` says which are used, `exclude` names or patterns of those that
    are left out; `population` is the kind that they are held to be, `auto` for what their weights show, and must not
    contradict it. Else checkpoints are collected as `collect` says, of a network that is first trained as
    `pretrain` says, unless they come from independent seeds. The fraction `heldout` of the collection, in blocks of
    consecutive checkpoints or, of several trainings, whole ones, is never read by a generator or a baseline: what they
    make is compared with it.

    `align: weights` permutes the units of every network so that they match those of a reference, the mean of the fitted
    ones, and with `balance` rescales them first where that changes nothing; generated networks are then aligned, too,
    before they are compared. `auto` does so for networks from independent seeds whose units are interchangeable."""

    parameters: Annotated[tuple[str, ...], Several] = ("all",)
    source: Place = ""
    format: Literal[("auto", *FORMATS)] = "auto"  # type: ignore[valid-type]
    source_select: SourceSelect = SourceSelect()
    exclude: Annotated[tuple[str, ...], Several] = ()
    population: Literal["auto", "trajectory", "seeds", "branches"] = "auto"
    heldout: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    align: Literal["auto", "none", "weights"] = "auto"
    balance: bool = True

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, parameters: tuple[str, ...]) -> tuple[str, ...]:
        if not parameters:
            raise ValueError("nothing would be generated, expected names or patterns of parameters, or all")
        return parameters


class CollectSection(Section):
    """How checkpoints are collected: `from` is one of COLLECTORS."""


class GeneratorSection(Section):
    """Which generator is fitted, on the first `checkpoints` of those that are not held out, 0 for all of them."""

    checkpoints: Annotated[int, Field(ge=0)] = 0


class AutoencoderSection(Section):
    """Vectors <-> latents. Reconstructed networks may lose `max_accuracy_drop` of validation accuracy; what happens
    when they lose more is `on_accuracy_drop`."""

    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] = 0.02
    on_accuracy_drop: Literal["warn", "stop"] = "warn"


class DiffusionSection(DiffusionOptions):
    """The training of a `denoiser` that learns a `prediction`."""


class Generate(Section):
    """How many networks are sampled; `batch_size` at a time.

    `batchnorm` says where the running statistics of their batch normalisation come from, if they are among the
    checkpoints: they are generated like everything else; `keep` takes those of the base network; `recompute` measures
    them on `recompute_images` training images. The null arms have theirs from the same source."""

    count: Positive = 200
    seed: Seed = 0
    batchnorm: Literal["generate", "keep", "recompute"] = "generate"
    recompute_images: Positive = 1000
    batch_size: Positive = without_effect(64)


class Evaluate(Section):
    """What generated networks are compared with, beside the originals: noise on originals at every scale of `noise`,
    and the `baselines`, `auto` for all that can be made of these originals; `baseline_count` networks of each. `kind`
    is how networks are evaluated; `auto` is by `function` or `command` where one is given, else on images where there
    is a data set. `warm_start` are numbers of steps: `baseline_count` generated networks are trained on for each of
    them, beside averages and newly initialised ones, to see which are soonest as accurate as the originals."""

    noise: Annotated[tuple[NonNegative, ...], Several] = (0.001, 0.05, 0.15)
    baselines: Annotated[tuple[str, ...], Several] = ("auto",)
    baseline_count: Positive = 25
    warm_start: Annotated[tuple[Positive, ...], Several] = ()

    @field_validator("noise")
    @classmethod
    def _check_noise(cls, noise: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{scale:g}" for scale in noise}) < len(noise):
            raise ValueError(f"a scale stands twice: {list(noise)}")
        return noise

    @field_validator("baselines")
    @classmethod
    def _check_baselines(cls, baselines: tuple[str, ...]) -> tuple[str, ...]:
        if baselines != ("auto",) and (unknown := [name for name in baselines if name not in BASELINES]):
            raise ValueError(f"unknown {unknown[0]!r}, expected auto, or some of {', '.join(BASELINES)}")
        return baselines


RESERVED = ("original", "heldout", "trajectory", "control", *BASELINES)
"""Groups of networks that no generator can be called."""
ENDS = ("_max", "_low", "_high")  # of metrics, which follow the name of a group
GENERATOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,59}")


class Audit(Section):
    """Networks of other people's generators, in place of one that is fitted here. `generated` is a folder of checkpoint
    files, a single file, or several of them by the names of their generators; `heldout` a folder of originals that no
    generator was fitted on, without which a part of `prepare.source` is set apart (`prepare.heldout`)."""

    generated: dict[str, Place]
    heldout: Place = ""

    @field_validator("generated", mode="before")
    @classmethod
    def _name_one(cls, value: Any) -> Any:
        return {"generated": value} if isinstance(value, str) else value

    @field_validator("generated")
    @classmethod
    def _check_generated(cls, generated: dict[str, str]) -> dict[str, str]:
        if not generated or not all(generated.values()):
            raise ValueError("nothing to audit, expected a folder, or several by the names of their generators")
        taken = {f"{name}{end}" for name in (*RESERVED, *generated) for end in ENDS}
        for name in generated:
            if not GENERATOR_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a generator, expected at most 60 letters, digits, _ and -")
            if name in RESERVED or family(name) not in ("generated", "named"):
                raise ValueError(f"{name!r} cannot name a generator, it is the name of another group")
            if name in taken:
                raise ValueError(f"{name!r} cannot name a generator beside {name.rpartition('_')[0]!r}")
        return generated


class Experiment(Section):
    """Everything that one tag stands for; without `dataset` and `network`, networks that pdiff cannot run itself. With
    `audit`, nothing is fitted: the sections of the generator are without effect.

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
    audit: Audit | None = None

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if self.audit:
            self._check_audit(self.audit)
        missing = [name for name in ("dataset", "network") if getattr(self, name) is None]
        if missing and not (self.prepare.source and len(missing) == 2):
            raise ValueError(f"{' and '.join(missing)}: is missing; only prepare.source can do without both")
        if GENERATORS[self.generator.kind].needs and not self.network:
            raise ValueError(f"generator.kind {self.generator.kind}: needs dataset and network, to know its units")
        if self.prepare.population != "auto" and not self.prepare.source:
            raise ValueError("prepare.population: needs prepare.source; what is collected here is known")
        used, collect = self.generator.checkpoints, self.prepare.collect
        if used > collect.total and not self.prepare.source:
            keys = " * ".join(f"prepare.collect.{key}" for key in collect.counts)
            raise ValueError(f"generator.checkpoints <= {keys} must hold, but got ({used}, {collect.total})")
        if not (collect.pretrains or self.prepare.source or self.prepare.parameters == ("all",)):
            raise ValueError(f"prepare.parameters must be all where prepare.collect.from is {self.collected_from}")
        trained = {"prepare.pretrain": self.prepare.pretrain} if collect.pretrains else {}
        trained["prepare.collect"] = collect
        trained |= {name: getattr(self, name) for name in GENERATORS[self.generator.kind].sections}
        for name, section in trained.items():
            batch_size = getattr(section, "batch_size", self.processes)
            if batch_size < self.processes:
                raise ValueError(f"processes <= {name}.batch_size must hold, but got ({self.processes}, {batch_size})")
        if self.evaluate.warm_start and (self.collected_from != "seeds" or self.evaluate.kind != "images"):
            raise ValueError("evaluate.warm_start: needs prepare.collect.from seeds and evaluate.kind images")
        if hasattr(self.generate, "sampler"):
            self._check_sampling()
        if self.generate.batchnorm != "generate" and not self.network:
            raise ValueError(f"generate.batchnorm {self.generate.batchnorm}: needs dataset and network")
        if not self.prepare.source and self.prepare.source_select != SourceSelect():
            raise ValueError("prepare.source_select: needs prepare.source, the checkpoints to select from")
        if self.prepare.align == "weights" and not self.network:
            raise ValueError("prepare.align weights: needs dataset and network, whose units are matched")
        return self

    def _check_audit(self, audit: Audit) -> None:
        if not self.prepare.source:
            raise ValueError("audit: needs prepare.source, the originals")
        if audit.heldout and self.prepare.heldout:
            raise ValueError(
                f"prepare.heldout must be 0 where audit.heldout gives the held-out ones, but got {self.prepare.heldout}"
            )

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
        unknown = set(getattr(generate, "condition", {})) - set(getattr(self.generator, "condition", ()))
        if unknown:
            known = ", ".join(self.generator.condition) or "nothing"
            raise ValueError(f"generate.condition: {min(unknown)!r} is not in generator.condition, which is {known}")
        if generate.trajectory_every and not self.diffusion.steps:
            raise ValueError("generate.trajectory_every needs diffusion.steps > 0: without a denoiser there is no way")

    def __reduce__(self) -> tuple:
        return experiment, (self.model_dump(),)  # the composed class cannot be imported by name

    @property
    def collected_from(self) -> str:
        """How checkpoints are collected: a name of COLLECTORS; empty where they are read from files."""
        return "" if self.prepare.source else getattr(self.prepare.collect, "from")

    def aligns(self, kind: str) -> bool:
        """Whether networks of a kind of population are aligned, where their units are interchangeable."""
        align = self.prepare.align
        return align == "weights" or (align == "auto" and kind == "seeds" and self.network is not None)

    @property
    def generator_options(self) -> GeneratorOptions:
        """The options of the generator that is fitted."""
        kind = GENERATORS[self.generator.kind]
        return kind.of(**{name: getattr(self, name) for name in ("generator", *kind.sections)})

    @property
    def evaluator(self) -> EvaluatorOptions:
        """How networks are evaluated."""
        return self.evaluate.part(EVALUATORS[self.evaluate.kind])

    @property
    def generators(self) -> tuple[str, ...]:
        """The groups of networks that come from generators."""
        return tuple(self.audit.generated) if self.audit else ("generated",)

    @property
    def control_count(self) -> int:
        """How many networks are sampled to see whether they have the accuracy that they are asked for."""
        conditioned = CONTROLLED in self.generator_options.columns and not self.audit
        return self.generate.control_count if conditioned else 0

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of one sampling from the generator."""
        return self.generate.part(GENERATORS[self.generator.kind].sampling).model_dump()


SECTIONS: dict[str, type[Section]] = {
    "prepare.collect": CollectSection,
    "generator": GeneratorSection,
    "autoencoder": AutoencoderSection,
    "diffusion": DiffusionSection,
    "generate": Generate,
    "evaluate": Evaluate,
}
"""The sections that depend on choices, as they are without the options of what is chosen."""


class Choice(NamedTuple):
    """A key whose value chooses an entry of a registry, whose options its section then has; or the default one."""

    section: str
    key: str
    registry: Mapping[str, type[Section]]
    default: str
    automatic: Callable[[Tree], str] | None = None  # what `auto` chooses

    @property
    def name(self) -> str:
        """The dotted key."""
        return f"{self.section}.{self.key}"

    def value(self, tree: Tree) -> str:
        """The entry that a configuration chooses; the default one where it chooses none that exists."""
        value = _section(tree, self.section).get(self.key)
        if isinstance(value, str) and value in self.registry:
            return value
        return self.automatic(tree) if self.automatic else self.default

    def field(self, kind: str) -> tuple[Any, Any]:
        """The type of the key, and its default, where an entry is chosen."""
        known = Literal[tuple(self.registry)]
        resolved = BeforeValidator(lambda value: kind if value == "auto" else value)
        return (Annotated[known, resolved] if self.automatic else known), kind


def _automatic_evaluator(tree: Tree) -> str:
    given = {name for name, value in _section(tree, "evaluate").items() if value not in ("", None)}
    return evaluators.automatic_kind(given, images=tree.get("dataset") is not None)


CHOICES = (
    Choice("generator", "kind", GENERATORS, "latent_diffusion"),
    Choice("autoencoder", "kind", AUTOENCODERS, "pca"),
    Choice("diffusion", "denoiser", DENOISERS, "mlp"),
    Choice("diffusion", "prediction", OBJECTIVES, "flow"),
    Choice("evaluate", "kind", EVALUATORS, "auto", _automatic_evaluator),
    Choice("prepare.collect", "from", COLLECTORS, "trajectory"),
)


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
    """The schema of experiments that make some choices, in the order of `CHOICES`."""
    return _composed(kinds, tuple(choice.registry[kind] for choice, kind in zip(CHOICES, kinds, strict=True)))


@lru_cache
def _composed(kinds: tuple[str, ...], options: tuple[type[Section], ...]) -> type[Experiment]:
    """The schema where some entries, with these options, are chosen: another entry of a name has another schema."""
    generator, collect = options[0], options[-1]  # they decide which sections there are
    parts: dict[str, list[type[Section]]] = {"prepare.collect": [], "generator": []}
    parts |= {name: list(mixed) for name, mixed in generator.sections.items()}
    parts |= {"generate": [generator.sampling, *generator.extras], "evaluate": []}
    keys: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for choice, kind, option in zip(CHOICES, kinds, options, strict=True):
        if choice.section in parts and choice.name not in generator.settles:
            keys[choice.section][choice.key] = choice.field(kind)
            if not (option is generator and generator.sections):  # else its options are in those sections
                parts[choice.section].append(option)
    sections: dict[str, Any] = {}
    for name, mixed in parts.items():
        bases = (*reversed(mixed), SECTIONS[name])  # keys come in the reversed order of bases
        section = create_model(SECTIONS[name].__name__, __base__=bases, __module__=__name__, **keys[name])
        sections[name] = (section, Field(default_factory=section))
    nested = {"collect": sections.pop("prepare.collect")}
    if collect.pretrains:
        nested = {"pretrain": (Pretrain, Pretrain())} | nested
    prepare = create_model("Prepare", __base__=Prepare, __module__=__name__, **nested)
    sections["prepare"] = (prepare, Field(default_factory=prepare))
    sections["register"] = (bool, Experiment.model_fields["register"])  # or pydantic would find ABCMeta.register
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message='Field name "register"')
        return create_model("Experiment", __base__=Experiment, __module__=__name__, **sections)


def _section(tree: Tree, name: str) -> Tree:
    """A section by its dotted name; empty where there is none."""
    for part in name.split("."):
        tree = tree.get(part)
        if not isinstance(tree, dict):
            return {}
    return tree


def affecting(section: BaseModel) -> dict[str, Any]:
    """A section as plain data, without what cannot change a result."""
    values = {}
    for name, field in type(section).model_fields.items():
        if (field.json_schema_extra or {}).get("affects_result", True):  # type: ignore[union-attr]
            value = getattr(section, name)
            values[name] = affecting(value) if isinstance(value, BaseModel) else value
    return values
