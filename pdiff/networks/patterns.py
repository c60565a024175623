"""Names selected by patterns: of tensors (`prepare.parameters`) and of files (`prepare.exclude`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from glob import escape

EVERYTHING = ("all",)


def literal(name: str) -> str:
    """The pattern that matches a name; what a YAML file cannot hold of it is left open."""
    return "".join(c if c.isprintable() else "?" for c in escape(name))


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names, in their order, that equal or match one of the patterns; every name for "all" alone."""
    everything = tuple(patterns) == EVERYTHING
    return [name for name in names if everything or any(fnmatchcase(name, pattern) for pattern in patterns)]
