"""The stage `audit`: networks of other people's generators, compared as those of a generator that is fitted here."""

from __future__ import annotations

from pathlib import Path

from pdiff.experiment import limits, summary
from pdiff.experiment.evaluate import aligned, baselines, results_of, write_audit
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import heldout_networks, original_networks, reference
from pdiff.experiment.schema import Experiment
from pdiff.method.collection import Collection, generated_numbers
from pdiff.method.log import Log, measured
from pdiff.method.standardize import Standardizer
from pdiff.networks.imported.files import checkpoint_files
from pdiff.networks.imported.plain import read_like
from pdiff.parallel import ranks


def audit(experiment: Experiment, out: Path, log: Log, *, prepare: Path, originals: Path | None = None) -> Metrics:
    """Compare networks from files with the originals, and with baselines that are made of those.

    Writes what the stage `evaluate` writes.

    Args:
        experiment: what to compare; the files are those of its section `audit`.
        out: folder to write to.
        log: receives seconds and memory.
        prepare: folder of the original networks.
        originals: folder with their evaluation, where there is one.

    Raises:
        UserError: a file that cannot be used, or is of another layout than the originals; with file and tensor.
    """
    history, settings = History(out, log), experiment.audit
    fitted, apart = original_networks(experiment, prepare), heldout_networks(prepare)
    limits.check(experiment, ["audit"], out, size=generated_numbers(fitted[0]))
    places = {"heldout": settings.heldout} if settings.heldout else {}
    keys = {name: f"audit.generated.{name}" for name in settings.generated} | {"heldout": "audit.heldout"}
    places |= settings.generated
    found = {name: read(experiment, place, fitted, keys[name]) for name, place in places.items()}
    groups = {"original": fitted} | ({"heldout": apart} if apart else {})
    groups |= aligned(to := reference(experiment, prepare), found, history)
    standardizer = Standardizer.fit(fitted)
    with measured(history, "baselines"):  # one of them is matched to the first generator
        arms = baselines(experiment, prepare, fitted, standardizer, groups[experiment.generators[0]])
        groups |= aligned(to, arms)
    with measured(history, "evaluate"):
        results = results_of(experiment, groups, out / STATE, prepare, originals)
    if ranks.rank():  # rank 0 has the results of all
        return {}
    upstream = {"prepare": prepare} | ({"originals": originals} if originals else {})
    largest = max(len(groups[name]) for name in experiment.generators)
    notes = [cost_of_a_split(len(fitted), len(apart), largest)] if apart else []
    found = summary.evaluated(groups, results, standardizer)
    return write_audit(experiment, out, history, found, experiment.generators, upstream, notes)


def read(experiment: Experiment, place: str, originals: Collection, key: str) -> Collection:
    """The networks in a folder or file, which must have the layout of the originals.

    Raises:
        UserError: nothing to read, an unusable file, or another layout; with file and tensor.
    """
    settings = experiment.prepare
    first = checkpoint_files(Path(settings.source).expanduser(), settings.exclude)[0]
    options = {"named": str(first), "key": key, "patterns": settings.parameters}
    return read_like(Path(place).expanduser(), originals[0], **options)


def cost_of_a_split(fitted: int, apart: int, generated: int) -> str:
    """What it costs that held-out networks were taken from the originals, for the reader of the verdict.

    Args:
        fitted: originals that are left.
        apart: originals that were set apart.
        generated: networks of the largest generator.
    """
    text = (
        f"Held out: none were given, so {apart} of the {fitted + apart} originals were set apart. A generator that was "
        f"fitted on all of them is flattered: its copies of those {apart} count as new, and the null arms are made of "
        f"{apart} originals fewer than it has seen."
    )
    if generated > 1:
        pairs = generated * apart
        least = -pairs / 2 / (pairs * (generated + apart + 1) / 12) ** 0.5  # all distances below those of held-out ones
        text += f" With {apart} held-out networks Z_U cannot fall below {least:.1f}, whatever was copied."
    return f"{text} Originals that no generator has seen, given as audit.heldout, avoid this."
