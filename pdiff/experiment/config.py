"""Experiments by tag: YAML files, `extends`, overrides. All problems are reported at once, each with file and key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pdiff.errors import UserError, one_line
from pdiff.experiment import documents, keys, schema
from pdiff.experiment.schema import Experiment, affecting
from pdiff.networks import user_code
from pdiff.networks.architectures import is_known, known_architectures
from pdiff.networks.datasets import DATASETS

FOLDERS = (Path("experiments"), (Path(__file__).parents[1] / "experiments").resolve())
"""Where experiments are: in the current folder, then those of pdiff, which an installed pdiff has with it."""

COMMAND_LINE = "command line"
MOST_FILES = 100  # that one experiment may extend, each counted as often as it is extended
FEW = 24  # names that a hint lists
MOST_PROBLEMS = 12  # that one message lists
Tree = dict[str, Any]


def tags() -> dict[str, Path]:
    """Tag -> file of every experiment in `experiments/`; those of the current folder come before those of pdiff."""
    found = {}
    for folder in reversed(FOLDERS):
        for place, _, names in sorted(os.walk(folder)):
            if os.path.basename(place) != "sweeps":
                printable = [name for name in names if name.endswith(".yaml") and name.isprintable()]
                found |= {name[:-5]: Path(place, name) for name in printable}
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


def of_tree(tag: str, tree: Tree, *, place: str = COMMAND_LINE) -> Experiment:
    """The experiment of a configuration that stands in no file.

    Args:
        tag: its name.
        tree: the configuration.
        place: where the configuration is from, for messages.

    Raises:
        UserError: as `load`.
    """
    _, experiment, problems = _validated(tag, tree, {}, {}, place, place)
    if problems:
        raise UserError("; ".join(problems))
    return experiment


def _checked(tag: str, overrides: Mapping[str, str], origin: str) -> tuple[Experiment | None, list[str]]:
    """The experiment of a tag, or all that is wrong with it."""
    known = tags()
    tree, origins = _read(tag, known)
    name, path = Path(tag).stem if _is_path(tag) else tag, str(known.get(tag, tag))
    tree, experiment, found = _validated(name, tree, origins, overrides, origin, path)
    unfinished = None in (tree.get("dataset"), tree.get("network"))
    if experiment is None and unfinished and tag in known.keys() - runnable().keys():
        rule = "is a base that other experiments extend, and no tag that can be run (`pdiff tags` lists those)"
        return None, [f"{path}: {rule}"]
    return experiment, found


def _validated(
    name: str, tree: Tree, origins: dict[str, str], overrides: Mapping[str, str], origin: str, path: str
) -> tuple[Tree, Experiment | None, list[str]]:
    """A configuration with its overrides; its experiment, or all that is wrong with it.

    Args:
        name: the tag.
        tree: the configuration.
        origins: key -> where it is from.
        overrides: dotted key -> value as text, in YAML.
        origin: where the overrides are from.
        path: where the configuration is from, for what stands nowhere.
    """
    layer: Tree = {}
    for key, text in overrides.items():
        put(layer, {}, key, text, origin)
    tree = keys.without_stale(tree, _merged(tree, layer))
    for key, text in overrides.items():
        put(tree, origins, key, text, origin)
    given, tree["tag"] = tree.get("tag", name), name
    experiment, found = None, _unknown_names(tree, origins)
    if given != name:
        found.append(f"{origin}: tag: the tag is the name of the file, {name}, and cannot be {given!r}")
    try:
        experiment = schema.experiment(tree)
    except ValidationError as error:
        chosen = {choice.name: choice.value(tree) for choice in schema.CHOICES}
        found = [*listed(error, lambda item: _problem(item, origins, path, chosen)), *found]
    return tree, experiment, found


def to_yaml(experiment: Experiment) -> str:
    """The complete configuration as YAML."""
    return documents.dump(experiment.model_dump(mode="json"))


def flat(experiment: Experiment) -> dict[str, Any]:
    """The complete configuration as dotted key -> value."""
    return dict(_leaves(experiment.model_dump(mode="json")))


def changes(experiment: Experiment) -> dict[str, Any]:
    """Dotted key -> value, of values that differ from those in the file of the experiment's tag.

    Keys that cannot change a result do not count; without a file in `experiments/` there is nothing to differ from.
    """
    return changed(load(experiment.tag), flat(experiment)) if experiment.tag in tags() else {}


def words(experiment: Experiment) -> list[str]:
    """The options of a command that name an experiment; none where its tag is in no file of `experiments/`."""
    if experiment.tag not in tags() or experiment.audit:
        return []
    given = [word for key, value in changes(experiment).items() for word in (f"--{key}", str(value))]
    return ["--tag", experiment.tag, *given]


def changed(experiment: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some values by dotted key, as they are or as text, that differ from an experiment's."""
    there = flat(experiment)
    without_effect = there.keys() - dict(_leaves(affecting(experiment))).keys()
    kept = {key: value for key, value in values.items() if key not in without_effect}
    return {key: value for key, value in kept.items() if key not in there or str(value) != str(there[key])}


# -- reading


def put(tree: Tree, origins: dict[str, str], key: str, text: str, origin: str = COMMAND_LINE) -> None:
    """Set a dotted key to a value given as text, in YAML, and record in `origins` where it is from."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{origin}: {key}: {section} is a value, not a section")
    tree[last] = documents.value(text)
    origins[key] = origin


def _is_path(tag: str) -> bool:
    return tag.endswith((".yaml", ".yml"))


def _read(tag: str, known: Mapping[str, Path]) -> tuple[Tree, dict[str, str]]:
    """The merged tree of a tag and everything it extends, and the file of each of its keys."""
    path = expanded(tag) if _is_path(tag) else known.get(tag)
    if path is None:
        raise UserError(_unknown(tag, list(runnable())))
    files = count(1)

    def layers(tag: str, path: Path, below: Mapping[Path, str]) -> tuple[Tree, dict[str, str]]:
        top, place, chain = documents.read(path), path.resolve(), [*below.values(), tag]
        if place in below:
            raise UserError(f"extends: {' -> '.join(chain)} is a circle")
        if next(files) > MOST_FILES:
            raise UserError(f"{path}: extends: more than {MOST_FILES} files belong to {chain[0]}")
        if (named := top.pop("tag", path.stem)) != path.stem:
            raise UserError(
                f"{path}: tag: the tag is the name of the file, expected no other, but got {one_line(repr(named), 100)}"
            )
        extends = top.pop("extends", [])
        parents = extends if isinstance(extends, list) else [extends]
        if not all(isinstance(parent, str) for parent in parents):
            raise UserError(
                f"{path}: extends: expected a tag or a list of tags, but got {one_line(repr(extends), 100)}"
            )
        tree: Tree = {}
        origins: dict[str, str] = {}
        for parent in parents:
            beside = path.parent / expanded(parent) if _is_path(parent) else known.get(parent)
            if beside is None:
                raise UserError(f"{path}: extends: {_unknown(parent, list(known))}")
            if not os.path.isfile(beside):  # of names that no file can have, too
                raise UserError(f"{path}: extends: {one_line(str(beside))} is not a file")
            inherited, inherited_origins = layers(parent, beside, {**below, place: tag})
            tree, origins = _overlaid(tree, inherited), origins | inherited_origins
        return _overlaid(tree, top), origins | {key: str(path) for key, _ in _leaves(top)}

    return layers(tag, path, {})


def expanded(path: str) -> Path:
    """A path with its `~` expanded, where that home folder exists."""
    return Path(os.path.expanduser(path))


def _unknown(tag: str, known: Sequence[str]) -> str:
    """That a tag is unknown, and the known ones most like it."""
    return f"unknown tag {one_line(repr(tag), 100)}; {nearest(tag, known)} (`pdiff tags` lists all)"


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
    """A hint at the known names most like a wrong one, or at all of them where they are few."""
    found = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.5)
    if found:
        return f"did you mean {' or '.join(found)}?"
    return f"known: {', '.join(sorted(known))}" if len(known) <= FEW else "nothing known is like it"


def listed(error: ValidationError, say: Callable[[Any], str]) -> list[str]:
    """The first problems of a configuration, each in words, and how many more there are."""
    items = error.errors(include_url=False, include_context=False)
    more = [f"and {len(items) - MOST_PROBLEMS} more problems"] if len(items) > MOST_PROBLEMS else []
    return [*(one_line(say(item)) for item in items[:MOST_PROBLEMS]), *more]


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
    choice, kinds = keys.belongs_to(key, chosen)
    name = choice.key if key.startswith(f"{choice.section}.") else choice.name
    return f"belongs to {name} {' or '.join(kinds)}, but {name} is {chosen[choice.name]}"


def rule(item: Any) -> str:
    """The rule of a validation error, and the value that broke it."""
    if item["type"] == "missing":
        return "is missing"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return message if item["type"] == "value_error" else f"{message}, but got {one_line(repr(item['input']), 100)}"


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
