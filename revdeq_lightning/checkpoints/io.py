"""Lightning's way to write and read checkpoints, over `revdeq_lightning.checkpoints.files`."""

import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.plugins import TorchCheckpointIO

from revdeq_lightning.checkpoints.files import other_checkpoint, read_checkpoint, write_checkpoint
from revdeq_lightning.checkpoints.names import is_sharded_checkpoint
from revdeq_lightning.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or absent, carry a checksum, and load without running code.

    Lightning's own writes into the system's temporary folder and moves: across file systems that is a copy, which
    a crash or a full disk cuts short.

    Args:
        errors: If a file cannot be written: "raise", or "warn", and keep the error in `failures`. A run of several
            processes needs "warn": only the first one writes, and the others would wait for it for ever.
    """

    def __init__(self, *, errors: Literal["raise", "warn"] = "raise") -> None:
        if errors not in ("raise", "warn"):
            raise ValueError(f"errors must be 'raise' or 'warn', got {errors!r}")
        self.errors = errors
        self.failures: dict[Path, OSError] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save to a local path.

        Raises:
            TypeError: If storage options are given; local files have none.
            OSError: If the file cannot be written and errors are to be raised.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} has no storage_options, got {storage_options!r}")
        path = Path(path)
        try:
            write_checkpoint(checkpoint, path)
        except OSError as error:
            self.note(path, error)
        else:
            self.note(path, None)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Check and read.

        Raises:
            ValueError: If code in the file is asked to be run (`weights_only=False`).
            CheckpointError: If the file is damaged or something else; says which one to use in its place.
        """
        if weights_only is False:
            raise ValueError("weights_only=False would run code that is in the checkpoint: leave it out")
        if is_sharded_checkpoint(path):
            raise CheckpointError(f"{path} is a sharded checkpoint (a folder), which EquilibriumFSDP2 reads")
        try:
            return read_checkpoint(path, map_location)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{other_checkpoint(path)}") from None

    def note(self, path: Path, error: OSError | None) -> None:
        """Raise or warn, as set, of an error with which a checkpoint was not written; None: it was.

        Raises:
            OSError: The error, if errors are to be raised.
        """
        if error is None:
            self.failures.pop(path, None)
            return
        if self.errors == "raise":
            raise error
        self.failures[path] = error
        kept = "what it held before is intact" if path.exists() else "there is none of this name now"
        warnings.warn(
            f"no checkpoint was written to {path}: {error.strerror or error}; {kept}. Training goes on, the next "
            "save tries again.",
            stacklevel=3,
        )
