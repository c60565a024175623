"""Zoos of Ray Tune: ModelZoos (modelzoos.cc), the phase-transition and the ViT zoos. Listed without torch.

`<zoo>/<trial>/params.json` or `config.json` describes a network, `result.json` has a JSON object on every line, one an
epoch, and `checkpoint_000050/checkpoints` is a state dict in a file without extension. A training's zeroth epoch may be
among the lines or not: `training_iteration` decides. Sizes come from the tensors, never from the description.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff.errors import UserError
from pdiff.files import is_utf8
from pdiff.networks.imported.zoo import Checkpoint, json_object, plain_values, read_text, subfolders

if TYPE_CHECKING:
    from pdiff.networks.imported.template import Template

DESCRIPTIONS = ("params.json", "config.json")
RESULTS = "result.json"
FILE = "checkpoints"
FOLDER = re.compile(r"checkpoint_(\d{1,18})")
BOOKKEEPING = (
    "pid",
    "timestamp",
    "time_",
    "timesteps_",
    "episodes_",
    "iterations_since",
    "warmup_time",
    "training_iteration",
)
"""Beginnings of the names of Ray's own columns, which say nothing of a network."""


def detects(folder: Path) -> bool:
    """Whether a folder holds a trial with a checkpoint."""
    return any(_is_trial(trial) and any(_checkpoints(trial)) for trial in subfolders(folder))


def checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Every checkpoint of every trial.

    Raises:
        UserError: a description or a line that is not JSON, or a line without its epoch.
    """
    for trial in filter(_is_trial, subfolders(folder)):
        if not is_utf8(trial.name):
            raise UserError(f"{trial}: its name is not UTF-8")
        description = next((trial / name for name in DESCRIPTIONS if (trial / name).is_file()), None)
        config = plain_values(json_object(read_text(description), str(description))) if description else {}
        results = _results(trial / RESULTS)
        described = tuple(path for path in (description, trial / RESULTS) if path and path.is_file())
        for epoch, path in _checkpoints(trial):
            yield Checkpoint(
                name=f"{trial.name}/{path.parent.name}",
                place=path,
                read=partial(_read, path),
                files=(path, *described),
                known={"network": trial.name, "epoch": epoch}
                | {k: v for k, v in (config | results.get(epoch, {})).items() if k not in ("network", "epoch")},
            )


def _is_trial(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*DESCRIPTIONS, RESULTS))


def _checkpoints(trial: Path) -> Iterator[tuple[int, Path]]:
    """Epoch and file of every checkpoint of a trial."""
    for folder in subfolders(trial):
        if (match := FOLDER.fullmatch(folder.name)) and (folder / FILE).exists():
            yield int(match[1]), folder / FILE


def _results(path: Path) -> dict[int, dict[str, Any]]:
    """Epoch -> what was measured after it."""
    found = {}
    for number, line in enumerate(read_text(path).splitlines() if path.is_file() else [], start=1):
        values = json_object(line, f"{path}, line {number}")
        epoch = values.get("training_iteration")
        if not isinstance(epoch, int) or isinstance(epoch, bool):
            raise UserError(f"{path}, line {number}: training_iteration is {epoch!r}, expected the number of an epoch")
        own = {k: v for k, v in values.items() if isinstance(v, int | float) and not k.startswith(BOOKKEEPING)}
        found[epoch] = plain_values(own)
    return found


def _read(path: Path) -> Template:
    from pdiff.networks.imported.template import Template

    return Template.read(path)
