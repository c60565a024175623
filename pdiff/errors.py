"""The exceptions that a command ends with as one line."""


class UserError(ValueError):
    """A mistake of the user: one line that says what, where, which value, and what was expected."""


class Pruned(BaseException):
    """Raised by a metric callback to stop a run early.

    A BaseException, so that `except Exception` does not swallow it.
    """


class ProcessError(Exception):
    """One of several data-parallel processes failed; the message holds its error."""


def one_line(text: str, longest: int = 600) -> str:
    """A text for a message: the middle is left out where it is too long, and what cannot be printed is escaped."""
    half = longest // 2
    shown = text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
