"""The exceptions that a command ends with as one line."""


class UserError(Exception):
    """A mistake of the user's: one line that says what, where, which value, and what was expected."""


class ProcessError(Exception):
    """One of several processes that compute together failed; its message tells of that process's own error."""
