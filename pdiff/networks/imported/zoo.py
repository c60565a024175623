"""The checkpoints of a folder in any of FORMATS, and what is known of each. No tensor is read, torch not imported."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff.errors import UserError, one_line
from pdiff.files import is_utf8
from pdiff.networks.imported import FORMATS
from pdiff.networks.imported.select import SourceSelect, choose
from pdiff.networks.patterns import matching

if TYPE_CHECKING:
    from pdiff.networks.imported.template import Template

LONGEST = 200  # characters of a text that is kept as metadata
LARGEST = 2**63  # integers from here on are not kept
STEPS = re.compile(r"checkpoint-(\d{1,18})")  # folders of the Trainer of Hugging Face


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a zoo, before its numbers are read.

    Attributes:
        name: unique in the zoo.
        place: its file or folder, or what stands for it in messages.
        read: reads it.
        files: all that it is read from, descriptions included; its digest is made of their sizes and times.
        known: its metadata; `network` names the training that it comes from, `epoch` or `step` say when.
    """

    name: str
    place: Path
    read: Callable[[], Template]
    files: tuple[Path, ...]
    known: Mapping[str, Any] = field(default_factory=dict)


def format_of(folder: Path, wanted: str = "auto") -> str:
    """The format of a folder: the wanted one, or the first of FORMATS that detects it; `plain` is the last."""
    return (
        wanted if wanted != "auto" else next(name for name in FORMATS if import_module(FORMATS[name]).detects(folder))
    )


def listed(
    folder: Path, format: str = "auto", exclude: Sequence[str] = (), select: SourceSelect | None = None
) -> list[Checkpoint]:
    """The checkpoints of a folder in their order, after `select` and without those that match `exclude`; maybe none.

    Raises:
        UserError: a description that cannot be read or does not fit, or a selection by what is not known.
    """
    name = format_of(folder, format)
    found = choose(import_module(FORMATS[name]).checkpoints(folder), select or SourceSelect(), f"{folder} ({name})")
    out = set(matching([c.name for c in found], exclude)) if exclude else set()
    return [checkpoint for checkpoint in found if checkpoint.name not in out]


def checkpoints_in(
    folder: Path,
    format: str = "auto",
    exclude: Sequence[str] = (),
    select: SourceSelect | None = None,
    *,
    key: str = "prepare.source",
) -> list[Checkpoint]:
    """As `listed`, but at least two.

    Args:
        folder: of the zoo.
        format: a name of FORMATS, or `auto`.
        exclude: names or patterns of checkpoints to leave out.
        select: which of the others are used; all when absent.
        key: of the configuration that names the folder, for messages.

    Raises:
        UserError: as `listed`; there is no such folder, too few checkpoints, or a name or pattern in `exclude` that
            matches none.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is not a folder")
    found = listed(folder, format, (), select)
    names = [checkpoint.name for checkpoint in found]
    for pattern in exclude:
        if not matching(names, [pattern]):
            raise UserError(f"prepare.exclude: {pattern!r} matches none of the {len(found)} files in {folder}")
    out = set(matching(names, exclude)) if exclude else set()
    kept = [checkpoint for checkpoint in found if checkpoint.name not in out]
    if len(kept) < 2:
        name = format_of(folder, format)
        what = "files .pth/.pt/.safetensors" if name == "plain" else f"checkpoints of the format {name}"
        left = f" beside {len(out)} excluded ones" if out else ""
        chosen = " that prepare.source_select selects" if select and select != SourceSelect() else ""
        raise UserError(f"{key}: {folder} holds {len(kept)} {what}{chosen}{left}, expected at least 2")
    return kept


def columns(checkpoints: Sequence[Checkpoint]) -> dict[str, list[Any]]:
    """What is known of some checkpoints: name of a column -> a value for each, None where it is not known."""
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.known if name != "name")
    return {name: [checkpoint.known.get(name) for checkpoint in checkpoints] for name in names}


def states(checkpoints: Iterable[Checkpoint], folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of some checkpoints; of a broken link its reader will say what it is."""
    files = dict.fromkeys(path for checkpoint in checkpoints for path in checkpoint.files)
    there = [(path, path.stat()) for path in files if path.exists()]
    return [(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in there]


# -- what several formats share


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder; numbers in names are sorted by value."""
    if not folder.is_dir():
        return []
    names = (name for name in os.listdir(folder) if (folder / name).is_dir())  # of a link to itself DirEntry raises
    return [folder / name for name in sorted(names, key=by_value)]


def by_value(name: str) -> list[tuple[str, int, str]]:
    """A key that sorts names with the numbers in them by value."""
    return [(text, int(digits or -1), digits) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def model_folders(folder: Path, holds: Callable[[Path], bool]) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Name, folder and metadata of every model in a folder in the manner of Hugging Face.

    A model is a folder; a training may be a folder of `checkpoint-<step>`; a repository in the cache of the hub is
    `models--<owner>--<name>/snapshots/<sha>`, whose revisions stand in `refs`. The folder is one of these, or holds
    some.

    Args:
        folder: where they are.
        holds: whether a folder is a model.
    """
    inner = list(_models(folder, folder.name, holds))
    for child in [] if inner else subfolders(folder):
        inner += _models(child, child.name, holds)
    for name, path, known in inner:
        if not is_utf8(name):
            raise UserError(f"{path}: its name is not UTF-8")
        yield name, path, known


def _models(folder: Path, network: str, holds: Callable[[Path], bool]) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """The models of one training or repository."""
    steps = [(match, path) for path in subfolders(folder) if (match := STEPS.fullmatch(path.name)) and holds(path)]
    if steps:
        for match, path in steps:
            yield f"{network}/{path.name}", path, {"network": network, "step": int(match[1])}
    elif holds(folder):
        yield network, folder, {"network": network}
    elif (folder / "snapshots").is_dir():
        revisions = {sha: name for name, sha in _refs(folder / "refs")}
        for path in subfolders(folder / "snapshots"):
            if holds(path):
                revision = revisions.get(path.name, path.name)
                step = re.fullmatch(r"step-?(\d{1,18})", revision)
                known = {"network": network, "revision": revision} | ({"step": int(step[1])} if step else {})
                yield f"{network}/{path.name}", path, known


def _refs(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and commit of the revisions of a repository in the cache of the hub."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_file() and path.stat().st_size < LONGEST:
            yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8", errors="replace").strip()


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable text: {getattr(error, 'strerror', None) or error}") from None


def json_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        UserError: it is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable JSON, expected an object: {one_line(str(error), 100)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds a {type(value).__name__}, expected a JSON object")
    return value


def plain_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers and short texts among some values; numbers that are not finite, or very large, are unknown: None."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if len(name) > LONGEST or not is_utf8(name):
            continue
        if isinstance(value, str) and len(value) <= LONGEST and is_utf8(value):
            found[prefix + name] = value
        elif isinstance(value, int | float):
            usual = math.isfinite(value) if isinstance(value, float) else abs(value) < LARGEST
            found[prefix + name] = value if usual else None
    return found
