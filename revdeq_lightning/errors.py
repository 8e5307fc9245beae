"""Errors that every room may raise, and a warning, each with a message of one line."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line: which one, why, what to do."""


class ParallelismError(ValueError):
    """Devices, model and strategy do not fit together; the message is one line that says what to do."""


class BlockError(ValueError):
    """A block of the user's own cannot be f; the message is one line."""


class RecordWarning(UserWarning):
    """Something that records the run failed, and its record has gaps from here on."""
