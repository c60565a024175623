"""The stage `originals`: how good the collected networks are, whatever is generated from them."""

from __future__ import annotations

from pathlib import Path

from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import evaluator, original_networks
from pdiff.experiment.schema import Experiment
from pdiff.files import copy_file
from pdiff.method.log import Log, measured


def originals(experiment: Experiment, out: Path, log: Log, *, prepare: Path) -> Metrics:
    """Evaluate the original networks. Writes `original.*`, a file of the evaluator, and `history.csv`."""
    history, group = History(out, log), original_networks(experiment, prepare)
    with measured(history, "originals"):
        evaluator(experiment, prepare)({"original": group}, out / STATE)
    for path in sorted((out / STATE).glob("original.*")):
        copy_file(path, out / path.name)
    return {}
