"""What a collection consists of: `population.json`, beside the checkpoints that `prepare` writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdiff.errors import Damaged, UserError
from pdiff.files import read_json, write_json

FILE = "population.json"


@dataclass(frozen=True)
class Population:
    """Where the checkpoints of a collection come from.

    Attributes:
        kind: `trajectory`, `seeds` or `branches`, as they were collected; `files`, as somebody else did.
        recipe: the options with which they were trained; empty for files.
        trained_on: data set and number of training images; empty where they are not known.
        columns: what is known of each checkpoint, held-out ones included, such as `name`, `network`, `seed`, `step`,
            `val_accuracy`: a value for each, in the order in which they were collected.
        heldout: indices of those that are held out, ascending.
    """

    kind: str
    recipe: dict[str, Any]
    trained_on: dict[str, Any]
    columns: dict[str, list[Any]]
    heldout: list[int]

    def save(self, folder: Path) -> None:
        """Write FILE."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Population:
        """Read FILE.

        Raises:
            Damaged: it is not there, or is something else.
        """
        values = read_json(folder / FILE)
        try:
            return cls(**values)
        except TypeError as error:
            raise Damaged(folder / FILE, f"not a description of a population: {error}") from None

    def column(self, name: str, *, heldout: bool = False) -> list[Any]:
        """A column of the checkpoints that generators are fitted on, or of those held out, in their order.

        Raises:
            UserError: there is no such column.
        """
        if name not in self.columns:
            raise UserError(f"the population has no column {name}, expected one of {', '.join(self.columns)}")
        held = set(self.heldout)
        return [value for k, value in enumerate(self.columns[name]) if (k in held) == heldout]

    def describe(self) -> str:
        """One line for people."""
        count = len(self.columns["name"])
        runs = len(set(self.columns.get("network", ())))
        each = f", {count // runs} checkpoints of each" if runs and count > runs else ""
        return {
            "trajectory": f"{count} checkpoints on the way of one training",
            "seeds": f"{runs} networks from independent seeds{each}",
            "branches": f"{runs} branches of one trunk{each}",
        }.get(self.kind, f"{count} checkpoints{f' of {runs} networks' if runs else ''} from files")
