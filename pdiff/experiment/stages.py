"""The stages: each maps directories to a directory, and tells a log what it measures. STAGES is their table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pdiff.experiment import digests
from pdiff.experiment.evaluate import VERDICTS, evaluate
from pdiff.experiment.generate import generate
from pdiff.experiment.history import Metrics
from pdiff.experiment.prepare import prepare
from pdiff.experiment.schema import Experiment
from pdiff.experiment.train import train


class Shared(NamedTuple):
    """A file or a folder that a stage takes from a finished run, where that has one of the same digest and has read
    the same runs."""

    name: str
    digest: Callable[[Experiment], str]  # empty: there is nothing to share
    reads: tuple[str, ...] = ()  # stages that it depends on


@dataclass(frozen=True)
class Stage:
    """A stage: what it does, which stages it reads, which sections of the configuration decide its result, and what
    of it depends on less."""

    run: Callable[..., Metrics]
    reads: tuple[str, ...]
    sections: tuple[str, ...]
    shared: Shared | None = None


PREPARED = ("dataset", "network", "prepare")
TRAINED = (*PREPARED, "generator", "autoencoder", "diffusion")
GENERATED = (*TRAINED, "generate")
STAGES = {
    "prepare": Stage(prepare, (), PREPARED, Shared("network.safetensors", digests.pretraining_digest)),
    "train": Stage(train, ("prepare",), TRAINED),
    "generate": Stage(generate, ("train",), GENERATED),
    "evaluate": Stage(
        evaluate,
        ("prepare", "train", "generate"),
        (*GENERATED, "evaluate"),
        Shared(VERDICTS, digests.verdict_digest, ("prepare",)),
    ),
}


def processes(stage: str, experiment: Experiment) -> int:
    """How many processes share a stage: those of the experiment, where it trains or evaluates on images; a function
    and a command of somebody's have `evaluate.workers` of their own."""
    shared = experiment.evaluator.distributed
    alone = {"prepare": experiment.prepare.source, "generate": True, "evaluate": not shared}
    return 1 if alone.get(stage) else experiment.processes
