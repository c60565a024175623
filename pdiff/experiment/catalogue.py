"""The catalogue: a row for each tag that can be run, with what it generates, and the published accuracies."""

from __future__ import annotations

from collections.abc import Sequence

from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.experiment.published import published
from pdiff.experiment.schema import Experiment
from pdiff.experiment.sizes import sizes

HEADER = ("category", "tag", "data set", "architecture", "generated", "published %")
NONE = "-"


def table(words: Sequence[str] = ()) -> tuple[list[tuple[str, ...]], list[str]]:
    """The tags that can be run.

    Args:
        words: only rows that contain each of these.

    Returns:
        The cells of every row, as `HEADER` names them, and what is wrong with files that cannot be loaded.
    """
    paths, experiments, problems = config.runnable(), {}, []
    for tag in sorted(paths, key=lambda tag: (paths[tag].parent.name, tag)):
        try:
            experiments[tag] = config.load(tag)
        except UserError as error:  # one broken file must not hide the others
            problems.append(f"cannot be loaded: {error}")
    names = {tag: (paths[tag].parent.name, tag, *_names(experiment)) for tag, experiment in experiments.items()}
    shown = [tag for tag, row in names.items() if all(word in " ".join(row) for word in words)]
    numbers = sizes([experiments[tag] for tag in shown])
    spaced = [NONE if size is None else f"{size:,}".replace(",", " ") for size in numbers]  # as 11 689 512
    return [(*names[tag], size, _accuracies(tag)) for tag, size in zip(shown, spaced, strict=True)], problems


def _names(experiment: Experiment) -> tuple[str, str]:
    """Data set and architecture."""
    if experiment.dataset is None or experiment.network is None:
        return NONE, NONE
    return experiment.dataset.name, experiment.network.architecture


def _accuracies(tag: str) -> str:
    """The published mean accuracies of original and generated networks."""
    found = published(tag)
    means = [found.get(f"test_accuracy/{group}_mean") for group in ("original", "generated")]
    return NONE if None in means else " -> ".join(f"{100 * mean:.2f}" for mean in means)
