"""The exceptions that a command ends with as one line."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text for one line of a terminal: line breaks, escape sequences and bytes that are not UTF-8 are spelt out.

    Names of files and tensors come from strangers; they must neither break a line nor recolour the terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """A mistake of the user: one printable line that says what, where, which value, and what was expected."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


class Pruned(BaseException):
    """Raised by a metric callback to stop a run early.

    A BaseException, so that `except Exception` does not swallow it.
    """


class ProcessError(Exception):
    """One of several data-parallel processes failed; the message holds its error."""
