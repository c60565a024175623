"""Which checkpoints of a zoo are used, by what is known of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.method.options import Section

if TYPE_CHECKING:
    from pdiff.networks.imported.zoo import Checkpoint

VALIDATION = ("val_accuracy", "validation_accuracy", "val_acc", "validation_acc")
TRAINING = ("train_accuracy", "training_accuracy", "train_acc", "training_acc")
TEST = ("test_accuracy", "test_acc")
"""Columns of accuracies; the first one that a zoo has counts, so test images only where there is nothing else."""

LISTED = 12  # columns named in a message
Number = Annotated[int, Field(ge=0)]


class SourceSelect(Section):
    """Which checkpoints of `source` are used, where its format tells more of them than their names.

    `epochs` are those to take, or `last` for the last checkpoint of every network; where the zoo counts steps, steps.
    `accuracy` is a range, both ends included, in the zoo's own unit, of the column `accuracy_column`; `auto` is the
    accuracy on validation images, else on training images; on test images only if the zoo has no other, with a warning.
    `metadata` are columns and the values that they must equal."""

    epochs: Annotated[
        Literal["all", "last"] | tuple[Number, ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, int) else value),
    ] = "all"
    accuracy: tuple[float, float] | None = None
    accuracy_column: str = "auto"
    metadata: dict[str, bool | int | float | str] = {}

    @field_validator("metadata", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """Dots in the names of columns, such as config.activation, are not those of sections."""
        if not isinstance(value, dict):
            return value
        pairs: dict[str, Any] = {}
        for name, inner in value.items():
            pairs |= (
                {f"{name}.{key}": v for key, v in cls._flat(inner).items()}
                if isinstance(inner, dict)
                else {name: inner}
            )
        return pairs

    @field_validator("accuracy")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and value[0] > value[1]:
            raise ValueError(f"low <= high must hold, but got {list(value)}")
        return value


def choose(checkpoints: Iterable[Checkpoint], select: SourceSelect, where: str) -> list[Checkpoint]:
    """The checkpoints that are selected, in their order; what is not selected is not kept in memory.

    Args:
        checkpoints: of a zoo.
        select: which of them.
        where: name of the zoo in messages.

    Raises:
        UserError: a selection by a column that the zoo does not have.
    """
    if select == SourceSelect():
        return list(checkpoints)
    seen: dict[str, None] = {}
    kept: dict[Any, tuple[int, Checkpoint]] = {}
    for k, checkpoint in enumerate(checkpoints):
        known = checkpoint.known
        seen |= dict.fromkeys(known)
        if any(name not in known or not _equal(known[name], value) for name, value in select.metadata.items()):
            continue
        time = known.get("epoch", known.get("step"))
        if select.epochs == "last":
            network = known.get("network")
            before = kept[network][1].known if network in kept else {}
            if time is None or time >= before.get("epoch", before.get("step", 0)):
                kept[network] = (k, checkpoint)
        elif select.epochs == "all" or time in select.epochs:
            kept[k] = (k, checkpoint)
    found = [checkpoint for _, checkpoint in sorted(kept.values(), key=lambda item: item[0])]
    for name in select.metadata:
        _check(name, seen, "metadata", where)
    if select.epochs != "all" and not {"epoch", "step"} & seen.keys():
        raise UserError(f"prepare.source_select.epochs: no epoch or step is known of the checkpoints in {where}")
    if select.accuracy is None:
        return found
    low, high = select.accuracy
    column = _accuracy_column(select, seen, where)
    values = (checkpoint.known.get(column) for checkpoint in found)
    within = [isinstance(value, int | float) and low <= value <= high for value in values]
    return [checkpoint for checkpoint, inside in zip(found, within, strict=True) if inside]


def _equal(found: Any, wanted: Any) -> bool:
    """Whether two values of metadata are the same: texts, too, that are written as the other is."""
    return found == wanted or str(found) == str(wanted)


def _accuracy_column(select: SourceSelect, seen: dict[str, None], where: str) -> str:
    """The column that a selection by accuracy reads."""
    name = select.accuracy_column
    if name == "auto":
        name = next((column for column in (*VALIDATION, *TRAINING, *TEST) if column in seen), "")
        if not name:
            raise UserError(f"prepare.source_select.accuracy: no accuracy is known of the checkpoints in {where}")
    else:
        _check(name, seen, "accuracy_column", where)
    if "test" in name.lower():
        _warn(
            f"warning: prepare.source_select.accuracy: checkpoints are selected by {name} of {where}, their accuracy "
            "on test images: what is measured on those images afterwards is flattered"
        )
    return name


def _check(name: str, seen: dict[str, None], key: str, where: str) -> None:
    if name not in seen:
        known = ", ".join([*list(seen)[:LISTED], *(["..."] if len(seen) > LISTED else [])]) or "none"
        raise UserError(f"prepare.source_select.{key}: {where} has no column {name!r}; its columns: {known}")


@cache
def _warn(text: str) -> None:
    """Print a warning once, however often a zoo is listed."""
    tqdm.write(text)
