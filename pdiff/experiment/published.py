"""What was published of the paper's experiments: `experiments/published.csv`, a row for each tag."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

from pdiff.experiment.config import FOLDERS
from pdiff.experiment.metrics import PAIRS

COUNTS = ("checkpoints", "generated")


def published(tag: str) -> dict[str, float]:
    """What the paper's repository logged for a tag, by the names of our metrics; empty where it logged nothing."""
    found = {}
    for path in (folder / "published.csv" for folder in reversed(FOLDERS)):
        if path.is_file():
            found |= _rows(path.absolute(), path.stat().st_mtime_ns).get(tag, {})
    return {
        f"{'similarity' if name in PAIRS else 'test_accuracy'}/{name}": float(value)
        for name, value in found.items()
        if value and name != "tag" and name not in COUNTS
    }


@lru_cache
def _rows(path: Path, time: int) -> dict[str, dict[str, str]]:
    """Tag -> row, kept for as long as the file's modification time is the same."""
    return {row["tag"]: row for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())}
