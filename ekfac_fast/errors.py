"""The errors that say what is wrong and what to do; anything else that is raised is a bug.

All are `Error`, which is what the command line prints without a traceback. Each is the built-in
error of its kind as well, so that callers need not know ours.
"""


class Error(Exception):
    """Something that the user can put right."""


class ArgumentError(Error, ValueError):
    """An argument is out of range, or does not go with another."""


class DataError(Error, ValueError):
    """An input is wrong; the message names the file and line, or the example, and what to do."""


class ModelError(Error, ValueError):
    """A model cannot be taken as it is; the message names the layer."""


class NotFiniteError(Error, ValueError):
    """A NaN or an infinity where a result needs a number; the message says where."""


class StoreError(Error, RuntimeError):
    """A file cannot be written, read or continued; the message names it and says what to do."""


class ProcessError(Error, RuntimeError):
    """Of several processes that share a run, another has failed, or was given another run."""


class MissingExtra(Error, ImportError):
    """A module that only an optional extra installs is not there."""


class Notice(UserWarning):
    """Something about a result that its reader should know; nothing is wrong with it."""
