"""The exceptions that a command ends with as one line, and with an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def printable(text: str) -> str:
    """A text for one line of a terminal: line breaks, escape sequences and bytes that are not UTF-8 are spelt out.

    Names of files and tensors come from strangers; they must neither break a line nor recolour the terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, longest: int = 600) -> str:
    """A printable text, whose middle is left out where it is too long."""
    half = longest // 2
    return printable(text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}")


class UserError(ValueError):
    """A mistake of the user: one printable line that says what, where, which value, and what was expected."""

    exit_code = 2

    def __str__(self) -> str:
        return printable(super().__str__())


@contextmanager
def for_users(what: str) -> Iterator[None]:
    """Make what the method raises about its data in the block the line that the user reads, which begins with `what`.

    Raises:
        UserError: in place of another ValueError.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


class Failure(UserError):
    """A fault of the world, such as a full disk or a database that is away, not the user's; one line, too."""

    exit_code = 1


class Damaged(Failure):
    """A file that pdiff wrote cannot be read, or is not as it was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


class Pruned(BaseException):
    """Raised by a metric callback to stop a run early.

    A BaseException, so that `except Exception` does not swallow it.
    """


class ProcessError(Exception):
    """One of several data-parallel processes failed; the message holds its error, whose traceback may follow."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, does not suffice; torch's is no MemoryError."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
