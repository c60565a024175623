"""Experiments by tag: YAML files, `extends`, overrides; everything checked at once, every problem by file and key."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pdiff import user_code
from pdiff.adopt import files_of
from pdiff.architectures import ARCHITECTURES, known_architectures
from pdiff.datasets import DATASETS, folder_state
from pdiff.errors import UserError
from pdiff.settings import Autoencoder, Collect, Experiment, without_neutral

FOLDERS = (Path("experiments"), Path(__file__).resolve().parent.parent / "experiments")
COMMAND_LINE = "command line"
SIMILARITIES = ("original_original", "generated_generated", "original_generated", "original_generated_max")
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
    for key, text in (overrides or {}).items():
        put(tree, origins, key, text, origin)
    tree["tag"] = Path(tag).stem if _is_path(tag) else tag
    problems = _unknown_names(tree, origins)
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        path = str(known.get(tag, tag))
        problems = [*(_problem(item, origins, path) for item in error.errors()), *problems]
    if problems:
        raise UserError("; ".join(problems))
    return experiment


def published(tag: str) -> dict[str, float]:
    """What the paper's repository logged of a tag, by the names of our metrics; empty where it logged nothing.

    `experiments/published.csv` also has its numbers of checkpoints and of generated networks.
    """
    found = {}
    for path in (folder / "published.csv" for folder in reversed(FOLDERS)):
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else []
        found |= next((row for row in rows if row["tag"] == tag), {})
    return {
        f"{'similarity' if name in SIMILARITIES else 'test_accuracy'}/{name}": float(value)
        for name, value in found.items()
        if value and name not in ("tag", "checkpoints", "generated")
    }


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
    neutral = there.keys() - dict(_leaves(without_neutral(own))).keys()
    kept = {key: value for key, value in values.items() if key not in neutral}
    return {key: value for key, value in kept.items() if key not in there or str(value) != str(there[key])}


def digest(experiment: Experiment, sections: Sequence[str]) -> str:
    """A fingerprint of everything in some sections that can change a result, and of the files that they name: those
    of `prepare.source` by their names, sizes and times, the others by their content."""
    values = without_neutral(experiment)
    content: Tree = {name: values[name] for name in ("seed", *sections)}
    source = experiment.prepare.source
    if source and "prepare" in sections:  # nothing is trained
        content["prepare"] = {k: v for k, v in values["prepare"].items() if k not in ("pretrain", "collect")}
        files = files_of(Path(source).expanduser(), experiment.prepare.exclude)
        content["files"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    if experiment.dataset and experiment.dataset.name == "image_folder":
        content["folder"] = folder_state(experiment.dataset)  # a root that is no mere place
    if contents := [_content(path) for path in _files(experiment, sections)]:
        content["contents"] = contents
    return _fingerprint(content)


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def pretraining_digest(experiment: Experiment) -> str:
    """A fingerprint of what pretraining depends on, less than the whole of `prepare`; empty where there is none."""
    if experiment.prepare.source or not experiment.prepare.pretrain.epochs:
        return ""
    only = experiment.prepare.model_copy(update={"parameters": ("all",), "collect": Collect()})
    return digest(experiment.model_copy(update={"prepare": only}), ("dataset", "network", "prepare"))


def verdict_digest(experiment: Experiment) -> str:
    """A fingerprint of what the verdict on the originals depends on, whatever is generated; empty where nobody judges.

    The modules beside a script count, which it may import: verdicts of two versions of them cannot be compared.
    """
    if not (experiment.dataset or experiment.evaluate.function or experiment.evaluate.command):
        return ""
    used = Autoencoder(checkpoints=experiment.autoencoder.checkpoints)
    asked = experiment.evaluate.model_copy(update={"noise": (), "noise_count": 1, "baselines": ()})
    only = experiment.model_copy(update={"autoencoder": used, "evaluate": asked})
    scripts = [path for path in _scripts(experiment) if path.suffix == ".py"]
    modules = sorted({module for path in scripts for module in path.parent.glob("*.py")})
    own = digest(only, ("dataset", "network", "prepare", "autoencoder", "evaluate"))
    return _fingerprint([own, *((module.name, _content(module)) for module in modules)])


def _files(experiment: Experiment, sections: Sequence[str]) -> list[Path]:
    """The files that some sections name: weights, an architecture, a function and the script of a command."""
    network = experiment.network
    found = [Path(network.weights).expanduser()] if network and network.weights else []
    if network and user_code.is_own(network.architecture):
        found.append(user_code.source(network.architecture))
    return found + (_scripts(experiment) if "evaluate" in sections else [])


def _scripts(experiment: Experiment) -> list[Path]:
    """The file of a function that evaluates, or those that a command names."""
    settings = experiment.evaluate
    if settings.function:
        return [user_code.source(settings.function)]
    named = (Path(settings.folder).expanduser() / word for word in _words(settings.command))
    return [path for path in named if path.is_file()]


def _words(command: str) -> list[str]:
    """The words of a command, each once, and those of words that are commands themselves, as of `sh -c`."""
    return list(dict.fromkeys(part for word in shlex.split(command) for part in (word, *word.split())))


def _content(path: Path) -> str:
    """A fingerprint of a file; empty where there is none."""
    return _hashed(path, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ""


@lru_cache
def _hashed(path: Path, size: int, time: int) -> str:
    """A fingerprint of a file, kept for as long as its size and time of change are the same."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        tree = _merged(tree, inherited)
        origins |= files
    origins |= {key: str(path) for key, _ in _leaves(own)}
    return _merged(tree, own), origins


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


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of a schema, with those of its sections: dataset, dataset.name, ..."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or one that may be absent
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


def _problem(item: Any, origins: dict[str, str], path: str) -> str:
    """One validation error as: file: key: rule, value; `path` is the file of the tag, for what stands nowhere."""
    known = list(known_keys(Experiment))
    parts = [str(part) for part in item["loc"]]
    while parts and ".".join(parts) not in known and item["type"] != "extra_forbidden":
        parts.pop()  # list positions and union branches
    key = ".".join(parts)
    places = [file for name, file in origins.items() if name == key or name.startswith(f"{key}.") or not key]
    where = f"{places[-1] if places else path}: {key}".removesuffix(": ")
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key; {nearest(key, known)}"
    return f"{where}: {rule(item)}"


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
