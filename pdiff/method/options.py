"""What options are made of: frozen sections with checked fields, entries of registries, the options of an optimiser.

The docstrings of sections are the documentation of the configuration's keys: each explains every key that it adds.
Imports no torch.
"""

from __future__ import annotations

import os
import pkgutil
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def several(value: Any) -> list | tuple:
    """A tuple, or one value as a tuple."""
    return value if isinstance(value, list | tuple) else (value,)


def _at_home(path: str) -> str:
    if os.path.expanduser(path).startswith("~"):
        raise ValueError(f"{path!r}: there is no such home folder")
    return path


Several = BeforeValidator(several)
Place = Annotated[str, AfterValidator(_at_home)]  # a file or folder, or nothing; `~` is the user's home


def without_effect(default: Any, **options: Any) -> Any:
    """A field that cannot change a result (a path, a device, a batch size of inference): it is in no digest."""
    return Field(default, json_schema_extra={"affects_result": False}, **options)


def resolve(entry: Any) -> Any:
    """The object behind an entry of a registry: the one that a string "module:name" names, or the entry itself."""
    return pkgutil.resolve_name(entry) if isinstance(entry, str) else entry


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _true_is_no_number(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        found = handler(value)
        pairs = zip(several(value), several(found), strict=False)
        if any(isinstance(given, bool) and not isinstance(taken, bool) for given, taken in pairs):
            raise ValueError(f"input should be a number, but got {value!r}")  # for Python, and pydantic, true is 1
        return found

    def part(self, kind: type[Section]) -> Any:
        """The options that another section has, too, as that section."""
        return kind(**{name: getattr(self, name) for name in kind.model_fields})


class Optimization(Section):
    """How something is trained, in PyTorch's terms, on batches of `batch_size`.

    `optimizer` has `learning_rate`, `weight_decay` (decoupled from the gradient in `adamw` alone) and, for `sgd`,
    `momentum`. `schedule` is that of the learning rate: `constant`; `cosine` from `learning_rate` to
    `final_learning_rate`; `one_cycle` up to `learning_rate` and down again, with the momentum (Adam's first beta) the
    other way round, as in PyTorch's OneCycleLR.
    """

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Rate = 1e-3
    weight_decay: NonNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    final_learning_rate: NonNegative = 0.0
    batch_size: Positive = 128

    @property
    def copies(self) -> int:
        """How many numbers a training holds of each that it learns: itself, its gradient, the optimiser's state."""
        return 2 + (2 if self.optimizer != "sgd" else bool(self.momentum))


class TrainingOptions(Optimization):
    """How a part of a generator is trained: for `steps` optimiser steps."""

    steps: Annotated[int, Field(ge=0)] = 1000
