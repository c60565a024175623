"""TODO experiment.history."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from pdiff.files import (
    append_line,
    whole_lines,
    write_text,
)
from pdiff.method.log import Log, Point

STATE = ".state"  # folder of a stage's own, for resuming; not an artifact
HISTORY = "history.jsonl"  # in it: points of the log
Metrics = dict[str, float]


class History:
    """A log that also keeps its points in a file, and tells those of an interrupted run again."""

    def __init__(self, out: Path, log: Log) -> None:
        self.log, self.path, self.points = log, out / STATE / HISTORY, {}
        for point in whole_lines(self.path):
            self._keep(Point(*point))
        write_text(self.path, "".join(json.dumps(point) + "\n" for point in self.points.values()))

    def _keep(self, point: Point) -> None:
        self.points[point.name, point.step] = point
        self.log(point)

    def __call__(self, point: Point) -> None:
        before = self.points.get((point.name, point.step))
        if before and point.name.startswith("seconds/"):  # of an interrupted run
            point = point._replace(value=point.value + before.value)
        append_line(self.path, json.dumps(point))
        self._keep(point)

    def save(self, path: Path) -> None:
        """Write all points as CSV: name, step, value."""
        frame = pd.DataFrame(self.points.values(), columns=["name", "value", "step"])
        write_text(path, frame[["name", "step", "value"]].to_csv(index=False))
