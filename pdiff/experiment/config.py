"""Experiments by tag: YAML files, `extends`, overrides. All problems are reported at once, each with file and key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pdiff.errors import UserError
from pdiff.experiment import keys, schema
from pdiff.experiment.schema import Experiment, affecting
from pdiff.networks import user_code
from pdiff.networks.architectures import is_known, known_architectures
from pdiff.networks.datasets import DATASETS

FOLDERS = (Path("experiments"), (Path(__file__).parents[1] / "experiments").resolve())
"""Where experiments are: in the current folder, then those of pdiff, which an installed pdiff has with it."""

COMMAND_LINE = "command line"
Tree = dict[str, Any]


def tags() -> dict[str, Path]:
    """Tag -> file of every experiment in `experiments/`; those of the current folder come before those of pdiff."""
    found = {}
    for folder in reversed(FOLDERS):
        for place, _, names in sorted(os.walk(folder)):
            if os.path.basename(place) != "sweeps":
                found |= {name[:-5]: Path(place, name) for name in names if name.endswith(".yaml")}
    return found


def runnable() -> dict[str, Path]:
    """Tag -> file of what can be run; what lies in `experiments/` itself is there to be extended."""
    return {tag: path for tag, path in tags().items() if path.parent.name != "experiments"}


def load(tag: str, overrides: Mapping[str, str] | None = None, *, origin: str = COMMAND_LINE) -> Experiment:
    """The experiment of a tag.

    Args:
        tag: the name of a file in `experiments/`, or a path to a YAML file.
        overrides: dotted key -> value as text, in YAML.
        origin: where the overrides are from, for messages.

    Raises:
        UserError: all problems in one message, each with file, key, value and rule.
    """
    experiment, problems = _checked(tag, overrides or {}, origin)
    if problems:
        raise UserError("; ".join(problems))
    return experiment


def problems(tag: str, overrides: Mapping[str, str], *, origin: str) -> list[str]:
    """What is wrong with an experiment, see `load`; nothing if it can be loaded."""
    return _checked(tag, overrides, origin)[1]


def _checked(tag: str, overrides: Mapping[str, str], origin: str) -> tuple[Experiment | None, list[str]]:
    """The experiment of a tag, or all that is wrong with it."""
    known, layer = tags(), {}
    tree, origins = _read(tag, known)
    for key, text in overrides.items():
        put(layer, {}, key, text, origin)
    tree = keys.without_stale(tree, _merged(tree, layer))
    for key, text in overrides.items():
        put(tree, origins, key, text, origin)
    tree["tag"] = Path(tag).stem if _is_path(tag) else tag
    experiment, found = None, _unknown_names(tree, origins)
    try:
        experiment = schema.experiment(tree)
    except ValidationError as error:
        path = str(known.get(tag, tag))
        chosen = {choice.name: choice.value(tree) for choice in schema.CHOICES}
        found = [*(_problem(item, origins, path, chosen) for item in error.errors()), *found]
    return experiment, found


def to_yaml(experiment: Experiment) -> str:
    """The complete configuration as YAML."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)


def flat(experiment: Experiment) -> dict[str, Any]:
    """The complete configuration as dotted key -> value."""
    return dict(_leaves(experiment.model_dump(mode="json")))


def changes(experiment: Experiment) -> dict[str, Any]:
    """Dotted key -> value, of values that differ from those in the file of the experiment's tag.

    Keys that cannot change a result do not count; without a file in `experiments/` there is nothing to differ from.
    """
    return changed(load(experiment.tag), flat(experiment)) if experiment.tag in tags() else {}


def changed(experiment: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some values by dotted key, as they are or as text, that differ from an experiment's."""
    there = flat(experiment)
    without_effect = there.keys() - dict(_leaves(affecting(experiment))).keys()
    kept = {key: value for key, value in values.items() if key not in without_effect}
    return {key: value for key, value in kept.items() if key not in there or str(value) != str(there[key])}


# -- reading


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the one in C is ten times as fast
    """YAML whose mappings have every key once; of two PyYAML itself takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def parse(path: Path) -> Tree:
    """The content of a YAML file of sections.

    Raises:
        UserError: it cannot be read, is not YAML, or is something else than sections.
    """
    try:
        stat = path.stat()
        content = deepcopy(_parsed(path.absolute(), stat.st_size, stat.st_mtime_ns))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected sections such as dataset and network")
    return content


@cache
def _parsed(path: Path, size: int, time: int) -> Any:
    """The content of a YAML file, kept for as long as its size and modification time are the same."""
    return yaml.load(path.read_text(encoding="utf-8"), _Loader)


def put(tree: Tree, origins: dict[str, str], key: str, text: str, origin: str = COMMAND_LINE) -> None:
    """Set a dotted key to a value given as text, in YAML, and record in `origins` where it is from."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{origin}: {key}: {section} is a value, not a section")
    try:
        tree[last] = yaml.safe_load(text) if text.strip() else text
    except yaml.YAMLError:
        tree[last] = text
    origins[key] = origin


def _is_path(tag: str) -> bool:
    return tag.endswith((".yaml", ".yml"))


def _read(tag: str, known: Mapping[str, Path], below: tuple[str, ...] = ()) -> tuple[Tree, dict[str, str]]:
    """The merged tree of a tag and everything it extends, and the file of each of its keys."""
    if tag in below:
        raise UserError(f"extends: {' -> '.join((*below, tag))} is a circle")
    path = Path(tag).expanduser() if _is_path(tag) else known.get(tag)
    if path is None:
        raise UserError(f"unknown tag {tag!r}; {nearest(tag, list(known))} (`pdiff tags` lists all)")
    top = parse(path)
    extends = top.pop("extends", [])
    parents = extends if isinstance(extends, list) else [extends]
    if not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: extends: expected a tag or a list of tags, but got {extends!r}")
    tree: Tree = {}
    origins: dict[str, str] = {}
    for parent in parents:
        beside = str(path.parent / Path(parent).expanduser()) if _is_path(parent) else parent
        inherited, inherited_origins = _read(beside, known, (*below, tag))
        tree, origins = _overlaid(tree, inherited), origins | inherited_origins
    return _overlaid(tree, top), origins | {key: str(path) for key, _ in _leaves(top)}


def _overlaid(base: Tree, top: Tree) -> Tree:
    """A layer on top of others, which does not inherit the options of a kind that it replaces."""
    return _merged(keys.without_stale(base, _merged(base, top)), top)


def _merged(base: Tree, top: Tree) -> Tree:
    """Two trees in one; `top` wins, sections are merged, lists are replaced."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a tree that is not a section."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# -- what is wrong


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known names most like a wrong one, or at the first of them."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(found)}?" if found else f"known: {', '.join(sorted(known)[:12])}"


def _problem(item: Any, origins: dict[str, str], path: str, chosen: Mapping[str, str]) -> str:
    """A validation error as `file: key: rule, value`.

    Args:
        item: of pydantic.
        origins: key -> where it is from.
        path: the file of the tag, for what is in no file.
        chosen: the choices of the configuration by dotted key.
    """
    known, key = keys.all_keys(), ""
    extra = item["type"] == "extra_forbidden"
    for position, part in enumerate(item["loc"], start=1):
        longer = f"{key}.{part}".removeprefix(".")
        if longer in known or (extra and position == len(item["loc"])):  # else a position in a list, or of a union
            key = longer
    places = [file for name, file in origins.items() if name == key or name.startswith(f"{key}.") or not key]
    where = f"{places[-1] if places else path}: {key}".removesuffix(": ")
    if not extra:
        return f"{where}: {rule(item)}"
    return f"{where}: {_foreign(key, chosen) if key in known else f'unknown key; {nearest(key, known)}'}"


def _foreign(key: str, chosen: Mapping[str, str]) -> str:
    """Why a key that exists cannot be used: it belongs to another entry than the one that is chosen."""
    choice, kinds = keys.belongs_to(key)
    name = choice.key if key.startswith(f"{choice.section}.") else choice.name
    return f"belongs to {name} {' or '.join(kinds)}, but {name} is {chosen[choice.name]}"


def rule(item: Any) -> str:
    """The rule of a validation error, and the value that broke it."""
    if item["type"] == "missing":
        return "is missing"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return message if item["type"] == "value_error" else f"{message}, but got {item['input']!r}"


def _unknown_names(tree: Tree, origins: dict[str, str]) -> list[str]:
    """Problems with the names of data set and architecture; other values than text are left to the schema."""
    problems = []
    for section, key, check in (("dataset", "name", _dataset), ("network", "architecture", _architecture)):
        values = tree.get(section)
        name = values.get(key) if isinstance(values, dict) else None
        if isinstance(name, str) and (problem := check(name)):
            problems.append(f"{origins.get(f'{section}.{key}', COMMAND_LINE)}: {section}.{key}: {problem}")
    return problems


def _dataset(name: str) -> str:
    """What is wrong with the name of a data set."""
    return "" if name in DATASETS else f"unknown {name!r}; {nearest(name, list(DATASETS))}"


def _architecture(name: str) -> str:
    """What is wrong with the name of an architecture."""
    if user_code.is_reference(name):
        return "" if user_code.source(name).is_file() else f"{user_code.source(name)} is not a file"
    return "" if is_known(name) else f"unknown {name!r}; {nearest(name, known_architectures())}"
