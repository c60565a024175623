"""The points of a stage in one file, `history.csv`: what the report reads and what a resumed stage repeats."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pdiff.errors import Damaged
from pdiff.files import append_line, write_text
from pdiff.method.log import Log, Point

STATE = ".state"  # folder beside the results of a stage with what it needs to resume; not an artifact
HISTORY = "history.csv"
LINEAGE = "lineage.json"  # stage -> the run of it that was read, and a link to that
HEADER = "name,step,value,time"  # time: seconds since 1970
SECONDS = "seconds/"  # these metrics grow over interruptions, see `pdiff.method.log.measured`
Metrics = dict[str, float]


class History:
    """A log that appends each point to a file before it passes it on.

    A resumed stage passes on the points that are in the file already. Where it logs one of them again, the first value
    stays; seconds are added up. Of a block that `kill -9` ended, the seconds up to the last file written count.
    """

    def __init__(self, out: Path, log: Log) -> None:
        self.path, self.log = out / HISTORY, log
        self.known: set[tuple[str, int]] = set()
        self.spent: dict[str, float] = {}  # seconds/... of earlier attempts
        last = _last_change(self.path, out / STATE)
        for point, at in self._rows():
            if point.name.startswith(SECONDS):
                self.spent[point.name] = point.value + (max(0.0, last - at) if point.step == 0 else 0.0)
            self.known.add((point.name, point.step))
            log(point)

    def __call__(self, point: Point) -> None:
        if point.name.startswith(SECONDS):
            point = point._replace(value=point.value + self.spent.get(point.name, 0.0))
        elif (point.name, point.step) in self.known:
            return
        self.known.add((point.name, point.step))
        append_line(self.path, f"{point.name},{point.step},{float(point.value)!r},{time.time():.3f}")
        self.log(point)

    def _rows(self) -> Iterator[tuple[Point, float]]:
        """Points and their times; creates the file, or cuts off the part of a line that a killed process left."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1] or f"{HEADER}\n"
        if whole != text:
            write_text(self.path, whole)
        try:
            for line in whole.splitlines()[1:]:
                name, step, value, at = line.split(",")
                yield Point(name, float(value), int(step)), float(at)
        except ValueError as error:
            raise Damaged(self.path, f"not a readable history: {error}") from None


def _last_change(*places: Path) -> float:
    """When the newest file in some places was written; 0 where there is none."""
    times = [0.0]
    for place in places:
        for path in (place, *place.rglob("*")):
            with suppress(FileNotFoundError):  # another process may be replacing it
                times.append(path.stat().st_mtime)
    return max(times)
