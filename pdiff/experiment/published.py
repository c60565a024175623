"""TODO experiment.published."""

from __future__ import annotations

import csv

from pdiff.experiment.config import FOLDERS
from pdiff.experiment.metrics import PAIRS


def published(tag: str) -> dict[str, float]:
    """What the paper's repository logged of a tag, by the names of our metrics; empty where it logged nothing.

    `experiments/published.csv` also has its numbers of checkpoints and of generated networks.
    """
    found = {}
    for path in (folder / "published.csv" for folder in reversed(FOLDERS)):
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else []
        found |= next((row for row in rows if row["tag"] == tag), {})
    return {
        f"{'similarity' if name in PAIRS else 'test_accuracy'}/{name}": float(value)
        for name, value in found.items()
        if value and name not in ("tag", "checkpoints", "generated")
    }
