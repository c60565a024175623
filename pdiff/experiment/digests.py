"""TODO experiment.digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pdiff.experiment.config import Tree
from pdiff.experiment.schema import Experiment, affecting
from pdiff.networks import user_code
from pdiff.networks.datasets import files_state
from pdiff.networks.imported.files import files_of
from pdiff.networks.options import Collect


def digest(experiment: Experiment, sections: Sequence[str]) -> str:
    """A fingerprint of everything in some sections that can change a result, and of the files that they name: those
    of `prepare.source` by their names, sizes and times, the others by their content."""
    values = affecting(experiment)
    content: Tree = {name: values[name] for name in ("seed", *sections) if name in values}
    source = experiment.prepare.source
    if source and "prepare" in sections:  # nothing is trained
        content["prepare"] = {k: v for k, v in values["prepare"].items() if k not in ("pretrain", "collect")}
        files = files_of(Path(source).expanduser(), experiment.prepare.exclude)
        content["files"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    if experiment.dataset and experiment.dataset.name == "image_folder":
        content["folder"] = files_state(experiment.dataset)  # a root that is no mere place
    if contents := [_content(path) for path in _files(experiment, sections)]:
        content["contents"] = contents
    return _fingerprint(content)


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def pretraining_digest(experiment: Experiment) -> str:
    """A fingerprint of what pretraining depends on, less than the whole of `prepare`; empty where there is none."""
    if experiment.prepare.source or not experiment.prepare.pretrain.epochs:
        return ""
    only = experiment.prepare.model_copy(update={"parameters": ("all",), "collect": Collect()})
    return digest(experiment.model_copy(update={"prepare": only}), ("dataset", "network", "prepare"))


def verdict_digest(experiment: Experiment) -> str:
    """A fingerprint of what the verdict on the originals depends on, whatever is generated; empty where nobody judges.

    The modules beside a script count, which it may import: verdicts of two versions of them cannot be compared.
    """
    if not experiment.evaluator.measures:
        return ""
    asked = experiment.evaluate.model_copy(update={"noise": (), "noise_count": 1, "baselines": ()})
    only = experiment.model_copy(update={"evaluate": asked})
    scripts = [path for path in experiment.evaluator.scripts() if path.suffix == ".py"]
    modules = sorted({module for path in scripts for module in path.parent.glob("*.py")})
    own = digest(only, ("dataset", "network", "prepare", "evaluate"))
    return _fingerprint(
        [own, experiment.generator.checkpoints, *((module.name, _content(module)) for module in modules)]
    )


def _files(experiment: Experiment, sections: Sequence[str]) -> list[Path]:
    """The files that some sections name: weights, an architecture, a function and the script of a command."""
    network = experiment.network
    found = [Path(network.weights).expanduser()] if network and network.weights else []
    if network and user_code.is_reference(network.architecture):
        found.append(user_code.source(network.architecture))
    return found + (experiment.evaluator.scripts() if "evaluate" in sections else [])


def _content(path: Path) -> str:
    """A fingerprint of a file; empty where there is none."""
    return _hashed(path, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ""


@lru_cache
def _hashed(path: Path, size: int, time: int) -> str:
    """A fingerprint of a file, kept for as long as its size and time of change are the same."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
