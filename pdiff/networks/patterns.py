"""Names selected by patterns: of tensors (`prepare.parameters`) and of files (`prepare.exclude`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from glob import escape

EVERYTHING = ("all",)
NOT_UTF8 = "[!\x01-\ud7ff\ue000-\U0010ffff]"  # matches a lone surrogate, which stands for such a byte


def literal(name: str) -> str:
    """The pattern that matches a name; bytes in it that are not UTF-8, which YAML cannot hold, are any such byte."""
    return "".join(NOT_UTF8 if "\ud800" <= c <= "\udfff" else c for c in escape(name))


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names, in their order, that equal or match one of the patterns; every name for "all" alone."""
    everything = tuple(patterns) == EVERYTHING
    return [name for name in names if everything or any(fnmatchcase(name, pattern) for pattern in patterns)]
