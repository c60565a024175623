"""Experiments from the options of a command: what `pdiff new` and `pdiff audit` have in common."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from os.path import exists, expanduser
from pathlib import Path
from typing import Any

from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.experiment import source as sources
from pdiff.experiment.schema import Experiment
from pdiff.networks.imported.files import some_checkpoints

FEW = ["average", "average_4", "gaussian", "mixed"]  # baselines where each network is expensive to evaluate
ALONE = "generated"  # the name of the only generator
NAMED = re.compile(r"([^=/\\]*)=(.*)", re.DOTALL)


def tree(given: config.Tree, overrides: Mapping[str, str]) -> config.Tree:
    """The sections of an experiment: what options give, without those that are empty, and overrides.

    Args:
        given: section -> key -> value; `dataset` and `network` among them.
        overrides: dotted key -> value as text, in YAML.

    Raises:
        UserError: a data set without an architecture, or the other way round.
    """
    found = {
        section: {key: deepcopy(value) for key, value in values.items() if value not in ("", [])}
        for section, values in given.items()
    }
    for key, text in overrides.items():
        config.put(found, {}, key, text)
    if bool(found["dataset"]) != bool(found["network"]):
        raise UserError("--dataset and --architecture belong together: one is given without the other")
    return found


def experiment(tag: str, tree: config.Tree, *, place: str) -> Experiment:
    """The experiment of what `tree` returns; see `config.of_tree`."""
    return config.of_tree(tag, {section: values for section, values in tree.items() if values}, place=place)


def written(path: Path) -> str:
    """A path as a configuration has it: relative inside the current folder, absolute outside."""
    path, here = path.resolve(), Path.cwd().resolve()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def evaluation(command: str, function: str) -> dict[str, Any]:
    """The keys of `evaluate` that say how networks are measured.

    Raises:
        UserError: a function without a file, or a command that cannot be split into words.
    """
    if function:
        file, colon, name = function.rpartition(":")
        if not colon or not name.isidentifier() or not Path(file).expanduser().is_file():
            raise UserError(f"--function: {function!r} is not path/to/file.py:function of a file that exists")
        return {"function": f"{written(Path(file).expanduser())}:{name}", "command": command}
    few = {"noise": [0.05], "baselines": FEW, "baseline_count": 5} if words(command) else {}  # each network runs it
    return {"command": command, **few}


def words(command: str) -> list[str]:
    """The words of a command.

    Raises:
        UserError: it cannot be split.
    """
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"--command: {command!r} cannot be split into words: {error}") from None


def audit(
    originals: str,
    generated: Sequence[str],
    *,
    heldout: str = "",
    dataset: str = "",
    architecture: str = "",
    function: str = "",
    command: str = "",
    align: str = "auto",
    overrides: Mapping[str, str] | None = None,
) -> Experiment:
    """The experiment of `pdiff audit`, called `audit_<folder of the originals>`.

    Args:
        originals: folder of checkpoint files that the generators were fitted on.
        generated: [NAME=]PLACE of the networks of each generator, or several in one text with commas between them.
        heldout: folder of originals that no generator was fitted on.
        dataset: what the networks were trained on, if pdiff knows it.
        architecture: of the networks, likewise.
        function: measures one network, see `evaluate.function`.
        command: measures one network, see `evaluate.command`.
        align: see `prepare.align`.
        overrides: further keys of the configuration -> value as text, in YAML.

    Raises:
        UserError: an option that cannot be used, or a place without checkpoint files.
    """
    source, places = config.expanded(originals), by_name(generated)
    others = {**{f"--generated {name}": place for name, place in places.items()}, "--heldout": heldout}
    given = {
        "dataset": {"name": dataset},
        "network": {"architecture": architecture},
        "prepare": {"source": written(source), "align": align} | ({"heldout": 0} if heldout else {}),
        "evaluate": evaluation(command, function),
        "audit": {
            "generated": {name: written(config.expanded(place)) for name, place in places.items()},
            "heldout": written(config.expanded(heldout)) if heldout else "",
        },
    }
    tag = "audit_" + re.sub(r"[^A-Za-z0-9_.-]", "_", source.resolve().name)
    found = experiment(tag, tree(given, overrides or {}), place=config.COMMAND_LINE)
    sources.checkpoints(found.prepare, key="--originals")
    for option, place in others.items():
        if place:
            some_checkpoints(config.expanded(place), key=option)
    return found


def by_name(generated: Sequence[str]) -> dict[str, str]:
    """Name of a generator -> place of its networks, from texts [NAME=]PLACE; one alone needs no name.

    What is the path of something that exists is a place, whatever signs it contains.

    Raises:
        UserError: none, one without a name among several, or two of one name.
    """
    parts = [part for text in generated for part in _places(text) if part]
    found: dict[str, str] = {}
    for part in parts:
        name, place = _split(part)
        if not name and len(parts) > 1:
            raise UserError(f"--generated {part}: expected NAME=DIR, since there are several")
        if not place:
            raise UserError(f"--generated {part}: expected a folder after {name}=")
        if name in found:
            raise UserError(f"--generated {part}: {name} is given twice, as {found[name]} and {place}")
        found[name or ALONE] = place
    if not found:
        raise UserError("--generated: expected a folder of networks")
    return found


def _places(text: str) -> list[str]:
    """The texts [NAME=]PLACE in a text that holds several of them, or one whose place may have commas in its name."""
    return [text] if exists(expanduser(_split(text)[1])) else text.split(",")


def _split(text: str) -> tuple[str, str]:
    """Name and place of a text NAME=PLACE; no name where the whole is the path of something that exists."""
    match = None if exists(expanduser(text)) else NAMED.fullmatch(text)
    return match.groups() if match else ("", text)
