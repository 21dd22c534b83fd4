"""Errors that the user can mend: a sentence that says what was wrong and what to do. The command line exits with 2."""


class UserError(ValueError):
    """Bad input: an argument, a file, or data that does not fit."""


class MissingExtra(UserError, ImportError):
    """An optional library is not installed; the message names the `pip install` line that brings it."""


class Diverged(UserError):
    """Training produced a number that is not finite."""


class ParityError(RuntimeError):
    """An exported file does not answer as its model does. Not the user's mistake: the command line exits with 1."""
