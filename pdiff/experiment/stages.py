"""STAGES: each maps folders of results to one more. A new stage is one entry; its code is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdiff.errors import UserError, for_users
from pdiff.experiment import digests, metrics
from pdiff.experiment.config import Tree
from pdiff.experiment.history import STATE, Metrics
from pdiff.experiment.schema import Experiment
from pdiff.files import scratch_folder
from pdiff.method.baselines import BASELINES
from pdiff.method.log import Log, names_of_measured
from pdiff.method.options import resolve
from pdiff.parallel.allocator import keep_freed_memory


@dataclass(frozen=True)
class Stage:
    """A step of an experiment.

    Attributes:
        run: a function, or its name as "module:function", imported when the stage runs. It is called with the
            experiment, the folder to write to, `log=` a log of points, and `<name>=` the folder of each stage that it
            reads; it returns final metrics.
        reads: stages that must have run, as far as the experiment has them; they stand before this one in STAGES.
        decided_by: the part of the configuration that decides its own result, as plain data. What decides the stages
            that it reads decides its result, too.
        exists: whether an experiment has this stage.
        distributed: whether the `processes` of an experiment share its work; otherwise one process does it.
        part_of: stages that read it, and that no one can repeat without repeating this one.
        logs: the metrics that it may log for an experiment; a sweep looks at no others.
        does: a sentence for the description of its run.
    """

    run: Callable[..., Metrics] | str
    reads: tuple[str, ...]
    decided_by: Callable[[Experiment], Tree]
    exists: Callable[[Experiment], bool] = lambda experiment: True
    distributed: Callable[[Experiment], bool] = lambda experiment: False
    part_of: tuple[str, ...] = ()
    logs: Callable[[Experiment], Sequence[str]] = lambda experiment: ()
    does: str = ""


SIZES = ("checkpoints", "heldout_checkpoints", "generated_parameters")
"""Numbers that the stage `prepare` returns."""


def collects(experiment: Experiment) -> bool:
    """Whether checkpoints are collected here, and not read from files."""
    return not experiment.prepare.source


def may_align(experiment: Experiment) -> bool:
    """Whether networks are aligned, if their kind asks for it."""
    return bool(experiment.network) and experiment.prepare.align != "none"


def pretrains(experiment: Experiment) -> bool:
    """Whether a network is trained before checkpoints are collected."""
    return collects(experiment) and experiment.prepare.collect.pretrains


def fits(experiment: Experiment) -> bool:
    """Whether a generator is fitted here, and not one of other people audited."""
    return experiment.audit is None


def _fitted(experiment: Experiment) -> list[str]:
    """The metrics of a fit, and of a reconstruction that can be evaluated."""
    reconstructed = experiment.dataset and hasattr(experiment, "autoencoder")
    accuracies = [f"autoencoder/{what}_val_accuracy" for what in ("original", "reconstruction") if reconstructed]
    return [*experiment.generator_options.logs, *accuracies]


def _evaluated(experiment: Experiment) -> list[str]:
    """The metrics of an evaluation."""
    settings, evaluator = experiment.evaluate, experiment.evaluator
    baselines = BASELINES if settings.baselines == ("auto",) else settings.baselines
    generators, arms = experiment.generators, [*(f"noise_{scale:g}" for scale in settings.noise), *baselines]
    parts = [part for part in evaluator.parts if part != "test" or getattr(evaluator, "test", True)]
    found = metrics.of_evaluation(["original", "heldout", *generators, *arms], parts, generators)
    measured = ["baselines", "evaluate", "audit"]
    measured += ["warm_start"] if settings.warm_start else []
    if experiment.aligns(experiment.collected_from or "seeds"):  # of files it is not known yet
        measured.append("align")
    control = metrics.CONTROL if experiment.control_count and "validation" in parts else ()
    warm = [f"warm_start/steps_{group}" for group in metrics.STARTS] if settings.warm_start else []
    return [*found, *control, *warm, *names_of_measured(*measured)]


STAGES = {
    "pretrain": Stage(
        "pdiff.experiment.pretrain:pretrain",
        does="Trains the base network.",
        reads=(),
        decided_by=digests.pretrained,
        exists=pretrains,
        distributed=pretrains,
        part_of=("prepare",),
        logs=lambda experiment: ("pretrain/loss", "pretrain/val_accuracy", *names_of_measured("pretrain")),
    ),
    "prepare": Stage(
        "pdiff.experiment.prepare:prepare",
        does="Collects checkpoints of the network, or reads them from files.",
        reads=("pretrain",),
        decided_by=digests.collected,
        distributed=lambda experiment: collects(experiment) or may_align(experiment),
        logs=lambda experiment: (*SIZES, "collect/loss", *names_of_measured("collect", "align")),
    ),
    "train": Stage(
        "pdiff.experiment.train:train",
        does="Fits the generator to the checkpoints.",
        reads=("prepare",),
        decided_by=digests.sections("seed", "generator", "autoencoder", "diffusion"),
        exists=fits,
        distributed=lambda experiment: True,
        logs=_fitted,
    ),
    "generate": Stage(
        "pdiff.experiment.generate:generate",
        does="Samples networks from the generator.",
        reads=("prepare", "train"),
        decided_by=digests.sections("generate"),
        exists=fits,
        logs=lambda experiment: ("generated", *names_of_measured("generate")),
    ),
    "originals": Stage(
        "pdiff.experiment.originals:originals",
        does="Evaluates the original networks.",
        reads=("prepare",),
        decided_by=digests.evaluated,
        exists=lambda experiment: experiment.evaluator.measures,
        distributed=lambda experiment: experiment.evaluator.distributed,
        part_of=("evaluate", "audit"),
        logs=lambda experiment: names_of_measured("originals"),
    ),
    "evaluate": Stage(
        "pdiff.experiment.evaluate:evaluate",
        does="Compares generated networks with the originals and the baselines.",
        reads=("pretrain", "prepare", "train", "generate", "originals"),
        decided_by=digests.sections("seed", "evaluate"),
        exists=fits,
        distributed=lambda experiment: experiment.evaluator.distributed,
        logs=_evaluated,
    ),
    "audit": Stage(
        "pdiff.experiment.audit:audit",
        does="Compares networks of other people's generators with their originals and the baselines.",
        reads=("prepare", "originals"),
        decided_by=digests.audited,
        exists=lambda experiment: not fits(experiment),
        distributed=lambda experiment: experiment.evaluator.distributed,
        logs=_evaluated,
    ),
}


def of(experiment: Experiment) -> list[str]:
    """The stages that an experiment has, in an order in which they can run."""
    return [name for name, stage in STAGES.items() if stage.exists(experiment)]


def evaluation(experiment: Experiment) -> str:
    """The stage of an experiment that compares networks."""
    return "evaluate" if fits(experiment) else "audit"


def reads(name: str, experiment: Experiment) -> list[str]:
    """The stages that a stage of an experiment reads."""
    return [other for other in of(experiment) if other in STAGES[name].reads]


def needed(name: str, experiment: Experiment) -> list[str]:
    """A stage, last, and before it all that it depends on, in an order in which they can run.

    Raises:
        UserError: the experiment does not have this stage.
    """
    if name not in (there := of(experiment)):
        raise UserError(f"{experiment.tag}: has no stage {name}, expected one of {', '.join(there)}")

    def up(name: str) -> Iterator[str]:
        yield name
        for other in reads(name, experiment):
            yield from up(other)

    found = set(up(name))
    return [other for other in STAGES if other in found]


def all_digests(experiment: Experiment) -> dict[str, str]:
    """Stage -> fingerprint of everything that decides its result, for all stages that an experiment has."""
    found: dict[str, str] = {}
    for name in of(experiment):
        upstream = {other: found[other] for other in reads(name, experiment)}
        found[name] = digests.fingerprint([name, STAGES[name].decided_by(experiment), upstream])
    return found


def run(name: str, experiment: Experiment, out: Path, *, log: Log, **folders: Path) -> Metrics:
    """Run a stage.

    Raises:
        UserError: a mistake in the configuration or in the files that it names.
    """
    keep_freed_memory()
    with for_users(name), scratch_folder(out / STATE):
        return resolve(STAGES[name].run)(experiment, out, log=log, **folders)


def processes(name: str, experiment: Experiment) -> int:
    """How many processes share a stage."""
    return experiment.processes if STAGES[name].distributed(experiment) else 1
