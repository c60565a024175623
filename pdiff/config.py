"""Experiments by tag: YAML files, `extends`, overrides; everything checked at once, every problem by file and key."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pdiff.adopt import files_of
from pdiff.architectures import ARCHITECTURES, known_architectures
from pdiff.datasets import DATASETS
from pdiff.errors import UserError
from pdiff.settings import Evaluate, Experiment, without_neutral

FOLDERS = (Path("experiments"), Path(__file__).resolve().parent.parent / "experiments")
COMMAND_LINE = "command line"
Tree = dict[str, Any]


def tags() -> dict[str, Path]:
    """Tag -> file, of every experiment in `experiments/`, here or beside the package; sweeps are none."""
    paths = (p for folder in reversed(FOLDERS) for p in sorted(folder.glob("**/*.yaml")) if p.parent.name != "sweeps")
    return {path.stem: path for path in paths}


def load(tag: str, overrides: Mapping[str, str] | None = None) -> Experiment:
    """The experiment of a tag.

    Args:
        tag: the name of a file in `experiments/`, or a path to a YAML file.
        overrides: dotted key -> value as text, in YAML.

    Raises:
        UserError: all problems in one message, each with file, key, value and rule.
    """
    tree, origins = _read(tag, ())
    for key, text in (overrides or {}).items():
        put(tree, origins, key, text)
    tree["tag"] = Path(tag).stem if _is_path(tag) else tag
    problems = _unknown_names(tree, origins)
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        path = str(tags().get(tag, tag))
        problems = [*(_problem(item, origins, path) for item in error.errors()), *problems]
    if problems:
        raise UserError("; ".join(problems))
    return experiment


def to_yaml(experiment: Experiment) -> str:
    """The complete configuration as YAML."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)


def flat(experiment: Experiment) -> dict[str, Any]:
    """The complete configuration as dotted key -> value."""
    return dict(_leaves(experiment.model_dump(mode="json")))


def digest(experiment: Experiment, sections: Sequence[str]) -> str:
    """A fingerprint of everything in some sections that can change a result: also of the checkpoint files of
    `prepare.source` that are not excluded, and of the scripts that `evaluate` runs."""
    values = without_neutral(experiment)
    content: Tree = {name: values[name] for name in ("seed", *sections)}
    if experiment.prepare.source:
        content["files"] = _stamps(files_of(Path(experiment.prepare.source).expanduser(), experiment.prepare.exclude))
    if "evaluate" in sections:
        content["scripts"] = _stamps(_scripts(experiment.evaluate))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _stamps(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What changes when a file does."""
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _scripts(settings: Evaluate) -> list[Path]:
    """The files that `evaluate.function` or `evaluate.command` names."""
    folder = Path(settings.folder).expanduser()
    words = [folder / word for word in settings.command.split()] + [Path(settings.function.rpartition(":")[0])]
    return [path.expanduser() for path in words if path.expanduser().is_file()]


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known names that look like a wrong one, or at what there is."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(found)}?" if found else f"known: {', '.join(sorted(known)[:12])}"


def _is_path(tag: str) -> bool:
    return tag.endswith((".yaml", ".yml"))


def _read(tag: str, below: tuple[str, ...]) -> tuple[Tree, dict[str, str]]:
    """The merged tree of a tag and everything it extends, and the file of each of its keys."""
    if tag in below:
        raise UserError(f"extends: {' -> '.join((*below, tag))} is a circle")
    known = tags()
    path = Path(tag).expanduser() if _is_path(tag) else known.get(tag)
    if path is None:
        raise UserError(f"unknown tag {tag!r}; {nearest(tag, list(known))} (`pdiff tags` lists all)")
    own = _parse(path)
    tree: Tree = {}
    origins: dict[str, str] = {}
    extends = own.pop("extends", [])
    parents = extends if isinstance(extends, list) else [extends]
    if not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: extends: expected a tag or a list of tags, but got {extends!r}")
    for parent in parents:
        inherited, files = _read(parent, (*below, tag))
        tree = _merged(tree, inherited)
        origins |= files
    origins |= {key: str(path) for key, _ in _leaves(own)}
    return _merged(tree, own), origins


def _parse(path: Path) -> Tree:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
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


def put(tree: Tree, origins: dict[str, str], key: str, text: str) -> None:
    """Set a dotted key from the command line in a tree, and tell `origins` where it is from."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{COMMAND_LINE}: {key}: {section} is a value, not a section")
    try:
        tree[last] = yaml.safe_load(text) if text.strip() else text
    except yaml.YAMLError:
        tree[last] = text
    origins[key] = COMMAND_LINE


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or one that may be absent
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _known_keys(kind, f"{prefix}{name}.")


def _problem(item: Any, origins: dict[str, str], path: str) -> str:
    """One validation error as: file: key: rule, value; `path` is the file of the tag, for what stands nowhere."""
    known = list(_known_keys(Experiment))
    parts = [str(part) for part in item["loc"]]
    while parts and ".".join(parts) not in known and item["type"] != "extra_forbidden":
        parts.pop()  # list positions and union branches
    key = ".".join(parts)
    places = [file for name, file in origins.items() if name == key or name.startswith(f"{key}.") or not key]
    where = f"{places[-1] if places else path}: {key}".removesuffix(": ")
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key; {nearest(key, known)}"
    if item["type"] == "missing":
        return f"{where}: is missing"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{where}: {message}" if item["type"] == "value_error" else f"{where}: {message}, but got {item['input']!r}"


def _unknown_names(tree: Tree, origins: dict[str, str]) -> list[str]:
    """Problems with the names that stand in registries; other values than text are left to the schema."""
    problems = []
    for section, key, registry in (("dataset", "name", DATASETS), ("network", "architecture", ARCHITECTURES)):
        values = tree.get(section)
        name = values.get(key) if isinstance(values, dict) else None
        if not isinstance(name, str) or name in registry:
            continue
        known = list(registry) if section == "dataset" else known_architectures()
        if name not in known:
            where = f"{origins.get(f'{section}.{key}', COMMAND_LINE)}: {section}.{key}"
            problems.append(f"{where}: unknown {name!r}; {nearest(name, known)}")
    return problems
