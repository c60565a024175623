"""The exceptions that a command ends with as one line."""


class UserError(Exception):
    """A mistake of the user's: one line that says what, where, which value, and what was expected."""


class Pruned(BaseException):
    """Whoever listens to a run has seen enough of it. Not a failure, so nothing that handles failures handles it."""


class ProcessError(Exception):
    """One of several processes that compute together failed; its message tells of that process's own error."""
