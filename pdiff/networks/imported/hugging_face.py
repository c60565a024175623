"""Models as Hugging Face stores them, each in a folder; see `zoo.model_folders` for where. Listed without torch.

`config.json`, and `model.safetensors` or `pytorch_model.bin`, or shards of either with an index.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pdiff.errors import UserError, one_line
from pdiff.networks.imported.zoo import Checkpoint, json_object, model_folders, plain_values, read_text

if TYPE_CHECKING:
    from pdiff.networks.imported.template import Template

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".bin")


def detects(folder: Path) -> bool:
    """Whether a folder is a model, or holds models."""
    return next(model_folders(folder, _holds), None) is not None


def checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Every model of a folder.

    Raises:
        UserError: a configuration or an index that cannot be read, an index that leads out of its folder, or a missing
            shard.
    """
    for name, model, known in model_folders(folder, _holds):
        config = plain_values(json_object(read_text(model / CONFIG), str(model / CONFIG)), "config.")
        weights = next(model / name for name in WEIGHTS if (model / name).exists())
        shards = _shards(weights)
        files = (*dict.fromkeys((weights, *shards)), model / CONFIG)
        yield Checkpoint(name, model, partial(_read, model, shards), files, known | config)


def _holds(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any((folder / name).exists() for name in WEIGHTS)


def _shards(weights: Path) -> dict[Path, set[str]]:
    """The files that hold the tensors, each with the names of those that an index expects in it."""
    if weights.suffix != ".json":
        return {weights: set()}
    where = json_object(read_text(weights), str(weights)).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{weights}: has no weight_map, expected tensor -> file")
    found: dict[Path, set[str]] = {}
    for tensor, file in where.items():
        inside = isinstance(file, str) and "\0" not in file and Path(file).name == file and "\\" not in file
        if not inside or not file.endswith(SUFFIXES):
            shown = one_line(repr(file), 100)
            raise UserError(f"{weights}: {one_line(tensor, 100)} is in {shown}, expected the name of a file beside it")
        found.setdefault(weights.with_name(file), set()).add(tensor)
    if missing := [path.name for path in found if not path.is_file()]:
        raise UserError(f"{weights}: the shard {missing[0]} is missing ({len(missing)} of {len(found)} are)")
    return found


def _read(model: Path, shards: dict[Path, set[str]]) -> Template:
    from pdiff.networks.imported.template import Template

    beside = {CONFIG: read_text(model / CONFIG)}
    if len(shards) == 1 and not any(shards.values()):
        return Template.read(next(iter(shards))).as_folder(WEIGHTS[0], beside)
    state = {}
    for path, names in shards.items():
        found = Template.read(path)
        named = {found.prefix + name: tensor for name, tensor in found.state.items()}
        if lacking := sorted(names - named.keys()):
            raise UserError(f"{path}: holds no {one_line(lacking[0], 100)}, which the index expects in it")
        state |= {name: named[name] for name in named if name in names}
    return Template.of(state).as_folder(WEIGHTS[0], beside)
