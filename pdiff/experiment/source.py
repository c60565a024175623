"""The checkpoints of `prepare.source`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pdiff.experiment.schema import Prepare
from pdiff.networks.imported.select import SourceSelect
from pdiff.networks.imported.zoo import Checkpoint, checkpoints_in, format_of, listed, states


def folder(settings: Prepare) -> Path:
    """The folder of the checkpoints."""
    return Path(settings.source).expanduser()


def checkpoints(settings: Prepare, *, key: str = "prepare.source") -> list[Checkpoint]:
    """Those that are used, at least two; see `zoo.checkpoints_in`."""
    return checkpoints_in(folder(settings), settings.format, settings.exclude, settings.source_select, key=key)


def count(settings: Prepare) -> int:
    """How many are used; 0 where there is no folder."""
    return len(listed(folder(settings), settings.format, settings.exclude, settings.source_select))


def content(settings: Prepare) -> dict[str, Any]:
    """What decides the result of reading them, as plain data: names, sizes and times of files, and what is chosen."""
    place = folder(settings)
    found = listed(place, settings.format, settings.exclude, settings.source_select)
    format, select = format_of(place, settings.format), settings.source_select
    chosen = {} if format == "plain" else {"format": format}
    chosen |= {} if select == SourceSelect() else {"select": select.model_dump()}
    return {"files": states(found, place), **chosen}
