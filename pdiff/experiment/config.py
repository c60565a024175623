"""Experiments by tag: YAML files, `extends`, overrides; everything checked at once, every problem by file and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pdiff.errors import UserError
from pdiff.experiment import schema
from pdiff.experiment.schema import Experiment, affecting
from pdiff.networks import user_code
from pdiff.networks.architectures import ARCHITECTURES, known_architectures
from pdiff.networks.datasets import DATASETS

FOLDERS = (Path("experiments"), Path(__file__).resolve().parents[2] / "experiments")
COMMAND_LINE = "command line"
Tree = dict[str, Any]


def tags() -> dict[str, Path]:
    """Tag -> file, of every experiment in `experiments/`, here or beside the package; sweeps are none."""
    paths = (p for folder in reversed(FOLDERS) for p in sorted(folder.glob("**/*.yaml")) if p.parent.name != "sweeps")
    return {path.stem: path for path in paths}


def runnable() -> dict[str, Path]:
    """Tag -> file of what can be run; what lies in `experiments/` itself is for `extends` alone."""
    return {tag: path for tag, path in tags().items() if path.parent.name != "experiments"}


def load(tag: str, overrides: Mapping[str, str] | None = None, *, origin: str = COMMAND_LINE) -> Experiment:
    """The experiment of a tag.

    Args:
        tag: the name of a file in `experiments/`, or a path to a YAML file.
        overrides: dotted key -> value as text, in YAML.
        origin: where the overrides stand, for messages.

    Raises:
        UserError: all problems in one message, each with file, key, value and rule.
    """
    known = tags()
    tree, origins = _read(tag, known)
    given: Tree = {}
    for key, text in (overrides or {}).items():
        put(given, {}, key, text, origin)
    tree = schema.without_stale(tree, given)
    for key, text in (overrides or {}).items():
        put(tree, origins, key, text, origin)
    tree["tag"] = Path(tag).stem if _is_path(tag) else tag
    problems = _unknown_names(tree, origins)
    try:
        experiment = schema.experiment(tree)
    except ValidationError as error:
        path = str(known.get(tag, tag))
        chosen = {choice.name: choice.value(tree) for choice in schema.CHOICES}
        problems = [*(_problem(item, origins, path, chosen) for item in error.errors()), *problems]
    if problems:
        raise UserError("; ".join(problems))
    return experiment


def to_yaml(experiment: Experiment) -> str:
    """The complete configuration as YAML."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)


def flat(experiment: Experiment) -> dict[str, Any]:
    """The complete configuration as dotted key -> value."""
    return dict(_leaves(experiment.model_dump(mode="json")))


def changes(experiment: Experiment) -> dict[str, Any]:
    """Dotted keys whose values are others than in the own file of its tag, and those values.

    Keys that cannot change a result do not count; a tag without a file in `experiments/` has nothing to differ from.
    """
    return changed(load(experiment.tag), flat(experiment)) if experiment.tag in tags() else {}


def changed(own: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """What of some values by dotted key, as they are or as text, is another than in an experiment."""
    there = flat(own)
    without_effect = there.keys() - dict(_leaves(affecting(own))).keys()
    kept = {key: value for key, value in values.items() if key not in without_effect}
    return {key: value for key, value in kept.items() if key not in there or str(value) != str(there[key])}


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known names that look like a wrong one, or at what there is."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(found)}?" if found else f"known: {', '.join(sorted(known)[:12])}"


def _is_path(tag: str) -> bool:
    return tag.endswith((".yaml", ".yml"))


def _read(tag: str, known: Mapping[str, Path], below: tuple[str, ...] = ()) -> tuple[Tree, dict[str, str]]:
    """The merged tree of a tag and everything it extends, and the file of each of its keys."""
    if tag in below:
        raise UserError(f"extends: {' -> '.join((*below, tag))} is a circle")
    path = Path(tag).expanduser() if _is_path(tag) else known.get(tag)
    if path is None:
        raise UserError(f"unknown tag {tag!r}; {nearest(tag, list(known))} (`pdiff tags` lists all)")
    own = parse(path)
    tree: Tree = {}
    origins: dict[str, str] = {}
    extends = own.pop("extends", [])
    parents = extends if isinstance(extends, list) else [extends]
    if not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: extends: expected a tag or a list of tags, but got {extends!r}")
    for parent in parents:
        beside = str(path.parent / Path(parent).expanduser()) if _is_path(parent) else parent
        inherited, files = _read(beside, known, (*below, tag))
        tree = _merged(schema.without_stale(tree, inherited), inherited)
        origins |= files
    origins |= {key: str(path) for key, _ in _leaves(own)}
    return _merged(schema.without_stale(tree, own), own), origins


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the one in C is ten times as fast
    """YAML whose mappings hold every key once; PyYAML itself takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def parse(path: Path) -> Tree:
    """The content of a YAML file that holds sections.

    Raises:
        UserError: it cannot be read, is not YAML, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected sections such as dataset and network")
    return content


def _merged(base: Tree, top: Tree) -> Tree:
    """Two trees in one; `top` wins, sections are merged, lists are replaced."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def put(tree: Tree, origins: dict[str, str], key: str, text: str, origin: str = COMMAND_LINE) -> None:
    """Set a dotted key to a value as text, in YAML, and tell `origins` where it is from."""
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


def _problem(item: Any, origins: dict[str, str], path: str, chosen: Mapping[str, str]) -> str:
    """One validation error as: file: key: rule, value; `path` is the file of the tag, for what stands nowhere; `chosen`
    are the choices of the configuration by dotted key."""
    known = schema.all_keys()
    parts = [str(part) for part in item["loc"]]
    while parts and ".".join(parts) not in known and item["type"] != "extra_forbidden":
        parts.pop()  # list positions and union branches
    key = ".".join(parts)
    places = [file for name, file in origins.items() if name == key or name.startswith(f"{key}.") or not key]
    where = f"{places[-1] if places else path}: {key}".removesuffix(": ")
    if item["type"] != "extra_forbidden":
        return f"{where}: {rule(item)}"
    if key not in known:
        return f"{where}: unknown key; {nearest(key, known)}"
    return f"{where}: {_foreign(key, chosen)}"


def _foreign(key: str, chosen: Mapping[str, str]) -> str:
    """Why a key that exists cannot be used: it belongs to another entry than the one that is chosen."""
    owners = schema.belongs_to(key)
    choice = owners[-1][0]
    kinds = " or ".join(kind for other, kind in owners if other == choice)
    name = choice.key if key.startswith(f"{choice.section}.") else choice.name
    return f"belongs to {name} {kinds}, but {name} is {chosen[choice.name]}"


def rule(item: Any) -> str:
    """What a validation error says: the rule, and the value that broke it."""
    if item["type"] == "missing":
        return "is missing"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return message if item["type"] == "value_error" else f"{message}, but got {item['input']!r}"


def _unknown_names(tree: Tree, origins: dict[str, str]) -> list[str]:
    """Problems with the names that stand in registries; other values than text are left to the schema."""
    problems = []
    for section, key, registry in (("dataset", "name", DATASETS), ("network", "architecture", ARCHITECTURES)):
        values = tree.get(section)
        name = values.get(key) if isinstance(values, dict) else None
        if not isinstance(name, str) or name in registry:
            continue
        where = f"{origins.get(f'{section}.{key}', COMMAND_LINE)}: {section}.{key}"
        if section == "network" and user_code.is_own(name):
            if not user_code.source(name).is_file():
                problems.append(f"{where}: {user_code.source(name)} is not a file")
            continue
        known = list(registry) if section == "dataset" else known_architectures()
        if name not in known:
            problems.append(f"{where}: unknown {name!r}; {nearest(name, known)}")
    return problems
