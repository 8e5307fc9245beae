"""Errors that every room may raise, each with a message of one line."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line: which one, why, what to do."""


class ParallelismError(ValueError):
    """Devices, model and strategy do not fit together; the message is one line that says what to do."""


class BlockError(ValueError):
    """A block of the user's own cannot be f; the message is one line."""
