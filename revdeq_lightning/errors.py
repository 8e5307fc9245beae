"""Errors and a warning that any package may raise, each with a one-line message."""


class CheckpointError(ValueError):
    """A checkpoint is unusable; the message is one line: which one, why, and what to do."""


class ParallelismError(ValueError):
    """Devices, model and strategy do not fit together; the message is one line that says what to do."""


class BlockError(ValueError):
    """A user-defined block is not a valid f; the message is one line."""


class DivergenceError(RuntimeError):
    """The state of a solve became non-finite or left the range of its arithmetic."""


class RecordWarning(UserWarning):
    """A logger or report failed; the records of the run are incomplete from here on."""
