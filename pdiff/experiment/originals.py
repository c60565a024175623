"""The stage `originals`: how good the collected networks are, whatever is generated from them."""

from __future__ import annotations

from pathlib import Path

from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import evaluator, heldout_networks, original_networks
from pdiff.experiment.schema import Experiment
from pdiff.files import copy_file
from pdiff.method.log import Log, measured


def originals(experiment: Experiment, out: Path, log: Log, *, prepare: Path) -> Metrics:
    """Evaluate the original networks, and those that are held out.

    Writes a file of the evaluator for each of the two groups, `original.*` and `heldout.*`, and `history.csv`.
    """
    history, heldout = History(out, log), heldout_networks(prepare)
    groups = {"original": original_networks(experiment, prepare)} | ({"heldout": heldout} if heldout else {})
    with measured(history, "originals"):
        evaluator(experiment, prepare)(groups, out / STATE)
    for name in groups:
        for path in sorted((out / STATE).glob(f"{name}.*")):
            copy_file(path, out / path.name)
    return {}
