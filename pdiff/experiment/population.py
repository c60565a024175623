"""What a collection consists of: `population.json`, beside the checkpoints that `prepare` writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pdiff.errors import Damaged, UserError
from pdiff.files import read_json, write_json

FILE = "population.json"


@dataclass(frozen=True)
class Population:
    """Where the checkpoints of a collection come from.

    Attributes:
        kind: `trajectory`, `seeds` or `branches`, as they were collected or, of files, as was measured; `files` where
            that is not clear.
        recipe: the options with which they were trained; empty for files.
        trained_on: data set and number of training images; empty where they are not known.
        columns: what is known of each checkpoint, held-out ones included, such as `name`, `network`, `seed`, `step`,
            `val_accuracy`: a value for each, in the order in which they were collected. Of files `digest`, equal for
            equal checkpoints.
        heldout: indices of those that are held out, ascending.
        measured: of files, what their weights show of where they come from (`Provenance.figures`).
    """

    kind: str
    recipe: dict[str, Any]
    trained_on: dict[str, Any]
    columns: dict[str, list[Any]]
    heldout: list[int]
    measured: dict[str, Any] = field(default_factory=dict)

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
        count, sizes = len(self.columns["name"]), Counter(self.columns.get("network", ()))
        fewest, most = (min(sizes.values()), max(sizes.values())) if sizes else (1, 1)
        several = f"{fewest} to {most}" if fewest < most else f"{most}"
        each = f", {several} checkpoints of each" if most > 1 else ""
        text = {
            "trajectory": f"{count} checkpoints on the way of one training",
            "seeds": f"{len(sizes)} networks from independent seeds{each}",
            "branches": f"{len(sizes)} branches of one trunk{each}",
        }.get(self.kind, f"{count} checkpoints{f' of {len(sizes)} networks' if sizes else ''} from files")
        copies = count - len(set(self.columns.get("digest", range(count))))
        return f"{text}, {copies} of them copies" if copies else text
