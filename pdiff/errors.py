"""The exceptions that a command ends with as one line."""


class UserError(ValueError):
    """A mistake of the user: one line that says what, where, which value, and what was expected."""


class Failure(UserError):
    """What failed without a mistake of the user's, such as a disk, a database, or every trial, in one such line."""


class Pruned(BaseException):
    """Raised by a metric callback to stop a run early.

    A BaseException, so that `except Exception` does not swallow it.
    """


class ProcessError(Exception):
    """One of several data-parallel processes failed; the message holds its error."""
