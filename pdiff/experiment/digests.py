"""What decides the result of each stage, as plain data: keys of the configuration, and the content of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pdiff.experiment import source
from pdiff.experiment.config import Tree
from pdiff.experiment.schema import Experiment, affecting
from pdiff.networks import user_code
from pdiff.networks.datasets import files_state
from pdiff.networks.imported.files import checkpoints_at
from pdiff.networks.imported.zoo import states

BASELINES = ("noise", "baseline_count", "baselines", "warm_start")  # keys of `evaluate` that leave originals alone


def fingerprint(content: Any) -> str:
    """A digest of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def sections(*names: str) -> Callable[[Experiment], Tree]:
    """Experiment -> some of its sections, without the keys that cannot change a result."""

    def chosen(experiment: Experiment) -> Tree:
        values = affecting(experiment)
        return {name: values[name] for name in names if name in values}

    return chosen


def base_network(experiment: Experiment) -> Tree:
    """Data set and network, with the content of the files that they name."""
    network, dataset = experiment.network, experiment.dataset
    content = sections("seed", "dataset", "network")(experiment)
    if network and network.weights:
        content["weights"] = _content(Path(network.weights).expanduser())
    if network and user_code.is_reference(network.architecture):
        content["architecture"] = _content(user_code.source(network.architecture))
    if dataset and dataset.name == "image_folder":
        content["folder"] = files_state(dataset)  # here the root is the data set, not only its place
    return content


def pretrained(experiment: Experiment) -> Tree:
    """What decides the pretrained network."""
    return base_network(experiment) | {"pretrain": affecting(experiment)["prepare"]["pretrain"]}


def collected(experiment: Experiment) -> Tree:
    """What decides the collection, given the pretrained network; or given files, by their names, sizes and times."""
    prepare = affecting(experiment)["prepare"]
    pretrain = prepare.pop("pretrain", None)
    for key in ("format", "source_select"):  # part of `source.content`, where they matter
        del prepare[key]
    if not experiment.prepare.source:
        del prepare["population"]  # which is of files
        return ({"seed": experiment.seed} if pretrain else base_network(experiment)) | {"prepare": prepare}
    del prepare["collect"]  # nothing is trained
    return base_network(experiment) | {"prepare": prepare, **source.content(experiment.prepare)}


def audited(experiment: Experiment) -> Tree:
    """What decides an audit, given the originals and their evaluation."""
    audit = experiment.audit
    places = [*audit.generated.values(), *([audit.heldout] if audit.heldout else [])]
    paths = [Path(place).expanduser() for place in places]
    files = [states(checkpoints_at(path), path.parent if path.is_file() else path) for path in paths]
    chosen = sections("seed", "evaluate", "audit")(experiment)
    return chosen | {"checkpoints": experiment.generator.checkpoints, "files": files}


def evaluated(experiment: Experiment) -> Tree:
    """What decides the evaluation of the originals, given the collection.

    A script counts with all modules beside it, which it may import: results of two versions cannot be compared.
    """
    evaluate = affecting(experiment)["evaluate"]
    for name in BASELINES:
        del evaluate[name]
    scripts = experiment.evaluator.scripts()
    modules = {module for path in scripts if path.suffix == ".py" for module in path.parent.glob("*.py")}
    contents = [(path.name, _content(path)) for path in sorted({*scripts, *modules})]
    return {"evaluate": evaluate, "checkpoints": experiment.generator.checkpoints, "scripts": contents}


def _content(path: Path) -> str:
    """A digest of a file; empty where there is none."""
    return _hashed(path, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ""


@lru_cache
def _hashed(path: Path, size: int, time: int) -> str:
    """A digest of a file, kept for as long as its size and time of change are the same."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
