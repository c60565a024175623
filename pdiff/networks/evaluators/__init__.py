"""EVALUATORS: kind -> options of an evaluator: on images, by a user's function or command, or not at all.

This file names the kinds and their options and does not import torch; the code of each kind lies in a module beside it,
which `make` imports.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple, Protocol

from pydantic import Field, model_validator

from pdiff.method.options import Place, Positive, Section, without_effect
from pdiff.networks import user_code

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pdiff.method.collection import Collection
    from pdiff.networks.images import Images
    from pdiff.networks.imported.template import Template

CHECKPOINT = "{checkpoint}"
VOTE_SIZES = (1, 2, 4, 8, 16, 32)  # networks of a vote; a vote of one is that network


class Votes(NamedTuple):
    """What is known of R soft votes, each of a random subset of the networks of a group.

    A vote is the mean of the softmax probabilities of its networks.

    Attributes:
        accuracy: share of right predictions, float64 (R,).
        nll: mean negative log likelihood of the labels in nats, float64 (R,).
        ece: expected calibration error, float64 (R,).
    """

    accuracy: Tensor
    nll: Tensor
    ece: Tensor


class Evaluation(NamedTuple):
    """What is known of the N networks of a group on one part of the data; None where something is unknown.

    An evaluation on images knows all, one by a function the first three, one by a command the accuracy.

    Attributes:
        accuracy: share of right predictions, float64 (N,).
        wrong: error mask: which images each network gets wrong, bool (N, images).
        predicted: predicted classes, an integer type (N, images).
        nll: mean negative log likelihood of the labels in nats, float64 (N,); inf where a probability is undefined.
        ece: expected calibration error with 15 bins, float64 (N,).
        reliability: of all networks together, float64 (bins, 3): predictions with a confidence in each bin, their mean
            confidence and their accuracy, both NaN where there are none.
        votes: number of networks m -> votes of m networks; those of one are all networks, R = N.
    """

    accuracy: Tensor
    wrong: Tensor | None = None
    predicted: Tensor | None = None
    nll: Tensor | None = None
    ece: Tensor | None = None
    reliability: Tensor | None = None
    votes: Mapping[int, Votes] | None = None

    @classmethod
    def of(cls, wrong: Tensor, predicted: Tensor | None = None) -> Evaluation:
        """The evaluation of networks whose error mask is known, and perhaps their predictions."""
        return cls(1 - wrong.double().mean(dim=1), wrong, predicted)


Evaluations = dict[str, dict[str, Evaluation]]  # part ("validation", "test") -> group -> evaluation


class Evaluator(Protocol):
    """Evaluates groups of networks.

    The folder keeps what an interrupted evaluation had found. A group that is finished has a file of its name there,
    and is not evaluated again where such a file is given.
    """

    def __call__(self, groups: Mapping[str, Collection], folder: Path) -> Evaluations: ...


@dataclass(frozen=True)
class Context:
    """What a stage knows of the networks that it evaluates; an evaluator calls for what it needs.

    Attributes:
        network: the base network, with all its weights.
        images: the data set of the experiment; it must have one.
        template: how files of these networks are laid out, and the tensors that are not generated.
        device: where to compute.
    """

    network: Callable[[], nn.Module]
    images: Callable[[], Images]
    template: Callable[[], Template]
    device: torch.device


class EvaluatorOptions(Section):
    """Options of one kind of evaluator. A new kind is a subclass with `make`, entered into EVALUATORS.

    Attributes:
        distributed: whether every process of an experiment (`processes`) evaluates its share of the networks; other
            kinds run in one process, which may start workers.
        measures: whether there is something to measure.
        parts: of the data, on which it may measure.
    """

    distributed: ClassVar[bool] = False
    measures: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("validation", "test")

    def make(self, context: Context) -> Evaluator:
        """The evaluator with these options."""
        raise NotImplementedError

    def scripts(self) -> list[Path]:
        """Files of the user that decide what is measured, and therefore belong to a digest."""
        return []


class OnImages(EvaluatorOptions):
    """Predictions on the validation and test images of the data set, `batch_size` at a time; `test: false` leaves the
    test images out."""

    distributed: ClassVar[bool] = True
    test: bool = True
    batch_size: Positive = without_effect(500)

    def make(self, context: Context) -> Evaluator:
        """An evaluator on the images of the data set."""
        from pdiff.networks.evaluators.images import ImagesEvaluator

        images = context.images()
        parts = {"validation": images.validation} | ({"test": images.test} if self.test else {})
        return ImagesEvaluator(context.network(), parts, batch_size=self.batch_size, device=context.device)


class ByFunction(EvaluatorOptions):
    """`function`, `path/to/file.py:function`, predicts with a state dict; in `workers` processes, 0 for one a core."""

    parts: ClassVar[tuple[str, ...]] = ("test",)
    function: Annotated[str, Field(min_length=1)]
    workers: Annotated[int, Field(ge=0)] = without_effect(0)

    def make(self, context: Context) -> Evaluator:
        """An evaluator that calls the function for each network."""
        from pdiff.networks.evaluators.function import FunctionEvaluator

        return FunctionEvaluator(self.function, context.template(), workers=self.workers)

    def scripts(self) -> list[Path]:
        """The file of the function."""
        return [user_code.source(self.function)]


class ByCommand(EvaluatorOptions):
    """`command`, run in `folder`, prints an accuracy for the checkpoint file that replaces `{checkpoint}` in it; the
    regular expression `pattern` finds the number. `workers` commands run at a time, 0 for one a core."""

    parts: ClassVar[tuple[str, ...]] = ("test",)
    command: Annotated[str, Field(min_length=1)]
    pattern: str = r"(?i)acc(?!\w*[2-9])\w*(?:@1)?(?!@)\W*?(\d*\.?\d+(?:e[-+]?\d+)?\s*%?)"
    folder: Place = ""
    workers: Annotated[int, Field(ge=0)] = without_effect(0)

    @model_validator(mode="after")
    def _check_command(self) -> ByCommand:
        if CHECKPOINT not in self.command:
            raise ValueError(f"command must hold {CHECKPOINT}, but got {self.command!r}")
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

    def make(self, context: Context) -> Evaluator:
        """An evaluator that runs the command for a file of each network."""
        from pdiff.networks.evaluators.command import CommandEvaluator

        folder = Path(self.folder).expanduser().absolute()
        return CommandEvaluator(self.command, context.template(), folder, self.pattern, workers=self.workers)

    def scripts(self) -> list[Path]:
        """The files that the command names, those in words that are commands themselves (`sh -c "..."`) among them."""
        words = dict.fromkeys(part for word in shlex.split(self.command) for part in (word, *word.split()))
        named = (Path(self.folder).expanduser() / word for word in words)
        return [path for path in named if path.is_file()]


class NotEvaluated(EvaluatorOptions):
    """Nothing is measured: there are neither images nor a function or command."""

    measures: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ()

    def make(self, context: Context) -> Evaluator:
        """An evaluator that finds nothing."""
        return lambda groups, folder: {}


EVALUATORS: dict[str, type[EvaluatorOptions]] = {
    "images": OnImages,
    "function": ByFunction,
    "command": ByCommand,
    "none": NotEvaluated,
}


def automatic_kind(given: Set[str], *, images: bool) -> str:
    """The kind of evaluator that `evaluate.kind: auto` chooses.

    Args:
        given: keys of the section `evaluate` that have a value; a kind is chosen by the keys that it requires.
        images: whether the experiment has a data set.

    Returns:
        The first one where the required keys of several kinds are given: those of the others are then refused.
    """
    required = {
        kind: {name for name, field in options.model_fields.items() if field.is_required()}
        for kind, options in EVALUATORS.items()
    }
    found = [kind for kind, keys in required.items() if keys and keys <= given]
    return found[0] if found else "images" if images else "none"
