"""YAML as users write it, in files and on the command line, within limits: no document costs more than its length."""

from __future__ import annotations

import json
import re
import stat
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pdiff.errors import UserError, one_line

LARGEST = 1 << 20  # bytes of a file
DEEPEST = 20  # sections and lists inside one another
EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+\Z")

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what neither a file's name nor a database can hold


class Refused(yaml.YAMLError):
    """What is YAML, but nothing that a configuration needs."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the one in C is ten times as fast
    """YAML whose mappings have every key once; of two PyYAML itself takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        places: dict[str, str] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                place = f"{key.start_mark.line + 1}:{key.start_mark.column + 1}"
                if (first := places.setdefault(key.value, place)) != place:
                    problem = f"{one_line(key.value)!r} stands twice, at {first} and {place}"
                    raise yaml.constructor.ConstructorError(problem=problem)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int | str:
        text = self.construct_scalar(node)
        try:
            return int(text, 0)
        except ValueError:  # 010 would be 8, 1:30 would be 90; thousands of digits
            return text


class _Dumper(yaml.SafeDumper):
    """Writes in quotes what `_Loader` would not read as text."""


for kind in (_Loader, _Dumper):  # 1e3 is a number, as in JSON and in later versions of YAML
    kind.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)  # a folder may be called 2024-01-31


def read(path: Path) -> dict[str, Any]:
    """The content of a YAML file of sections.

    Raises:
        UserError: it cannot be read, is not plain YAML of a moderate size, or is something else than sections.
    """
    try:
        status = path.stat()
        ordinary = stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST
        content = deepcopy(_parsed(path.absolute(), status.st_size, status.st_mtime_ns)) if ordinary else None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise UserError(f"{path}: cannot be read: {error}") from None
    except Refused as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        message = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise UserError(f"{path}: not YAML: {message}") from None
    if not ordinary:
        raise UserError(f"{path}: is not an ordinary file of at most {LARGEST} bytes")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected sections such as dataset and network")
    return content


@cache
def _parsed(path: Path, size: int, time: int) -> Any:
    """The content of a YAML file, kept for as long as its size and modification time are the same."""
    with path.open(encoding="utf-8") as file:
        return _content(file.read(LARGEST))


def value(text: str) -> Any:
    """A value given as text; what is not YAML is text, as patterns such as `*.bias` are."""
    try:
        return _content(text) if text.strip() else text
    except (yaml.YAMLError, UnicodeEncodeError):
        return text


def as_text(value: Any) -> str:
    """A value as YAML on one line."""
    return json.dumps(value, default=str)  # YAML knows dates


def dump(content: Any, **options: Any) -> str:
    """YAML that `read` and `value` take for the same content; `options` are those of `yaml.dump`."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, **options)


def _content(text: str) -> Any:
    """The content of a document.

    Raises:
        yaml.YAMLError: it is not YAML, or `Refused`.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        place = f"(line {event.start_mark.line + 1})"
        if isinstance(event, yaml.AliasEvent):
            raise Refused(f"aliases such as *{event.anchor} are not taken {place}, expected the value itself")
        if tag := getattr(event, "tag", None):
            raise Refused(f"YAML tags such as {tag} are not taken {place}")
        if NO_TEXT.search(getattr(event, "value", "")):
            raise Refused(f"a NUL character or half a Unicode character is not taken {place}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise Refused(f"sections and lists stand more than {DEEPEST} deep in one another {place}")
    return yaml.load(text, _Loader)
