"""The leaderboard: published results and ours side by side, as a table, as text, and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pdiff.experiment import report
from pdiff.experiment.metrics import COMPARED, OFF_BOARD, find

SIDES = ("published", "ours", "difference")
FIGURES = {
    "Test accuracy: originals and generated networks": ("original mean", "generated mean"),
    "Similarity: among originals and among generated networks": ("original-original", "generated-generated"),
}
"""Heading of a figure -> the two metrics that it compares."""
READING = (
    "Two points of one tag: open ones are published, filled ones are ours; a star marks a tag of which our run was "
    "changed, so that it is no repetition of what was published. On the right the second minus the first."
)


@dataclass(frozen=True)
class Result:
    """What is known of a tag.

    Attributes:
        tag: its name.
        published: metric -> value; empty where nothing was published.
        ours: metric -> value; empty where it was never run.
        changed: dotted key -> value, of settings in which our run differs from the tag's file.
        run: the identifier of our run.
    """

    tag: str
    published: Mapping[str, float] = field(default_factory=dict)
    ours: Mapping[str, float] = field(default_factory=dict)
    changed: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""


def shown() -> dict[str, str]:
    """Label -> metric of what the leaderboard compares."""
    return {label: name for label, name in COMPARED.items() if label not in OFF_BOARD}


def table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a tag: tag, run, changed, and of every metric what is published, ours, and ours minus published.

    Accuracies are fractions. Columns of metrics are called "generated mean published", and so on.
    """
    rows = []
    for result in results:
        changed = "; ".join(f"{key}={value}" for key, value in result.changed.items())
        row: dict[str, Any] = {"tag": result.tag, "run": result.run, "changed": changed}
        for label, name in shown().items():
            published, ours = (float(side.get(name, "nan")) for side in (result.published, result.ours))
            values = (published, ours, ours - published)
            row |= {f"{label} {side}": value for side, value in zip(SIDES, values, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows, columns=["tag", "run", "changed", *(f"{m} {side}" for m in shown() for side in SIDES)])


def cells(board: pd.DataFrame) -> pd.DataFrame:
    """The board as text for people: ours, and what is published in brackets; accuracies in percent."""
    columns = {"tag": board["tag"]}
    for label in shown():
        published, ours, _ = (_cells(board, label, side) for side in SIDES)
        columns[label] = ours + " (" + published + ")"
    return pd.DataFrame(columns | {"changed": board["changed"].map(_shortened)})


def page(board: pd.DataFrame) -> str:
    """One HTML page: what the board says, figures, table, and everything that was changed."""
    from pdiff.experiment import figures

    found = {heading: figures.dumbbells(board, *pair) for heading, pair in FIGURES.items()}
    columns = [_cells(board, label, side) for label in shown() for side in SIDES]
    metrics = {label: find(name) for label, name in shown().items()}
    return report.page(
        "leaderboard",
        title="Leaderboard: published results and ours",
        findings=findings(board),
        headings={f"{label}, %" if m.unit == "%" else label: m.hint for label, m in metrics.items()},
        rows=list(zip(board["tag"], board["changed"].map(_shortened), zip(*columns, strict=True), strict=True)),
        plots=[report.section(heading, READING, figure) for heading, figure in found.items() if figure.data],
        changes=board.loc[board["changed"] != "", ["tag", "changed"]].to_numpy().tolist(),
    )


def findings(board: pd.DataFrame) -> str:
    """How many tags were run, and how generated networks compare with their originals, in plain words."""
    run, changed = board["run"] != "", board["changed"] != ""
    sentences = [f"{run.sum()} of {len(board)} tags were run here, {(run & changed).sum()} of them with changes."]
    for side, whose in {"published": "published results", "ours": "runs of ours"}.items():
        gain = (board[f"generated mean {side}"] - board[f"original mean {side}"]).dropna()
        if len(gain):
            sentences.append(
                f"In {(gain > 0).sum()} of {len(gain)} {whose} generated networks are on average more accurate "
                f"than their originals; the mean difference is {100 * gain.mean():+.2f} points."
            )
    return " ".join(sentences)


def _cells(board: pd.DataFrame, label: str, side: str) -> pd.Series:
    """A column of numbers as text."""
    metric, sign = find(COMPARED[label]), "+" if side == "difference" else ""
    return board[f"{label} {side}"].map(lambda value: metric.text(value, sign=sign)).astype(str)


def _shortened(changed: str) -> str:
    """The first change, and the number of others."""
    first, *others = changed.split("; ")
    return f"{first} +{len(others)}" if others else first
