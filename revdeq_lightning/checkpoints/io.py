"""Lightning's checkpoint plugin, based on `revdeq_lightning.checkpoints.files`."""

import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.plugins import TorchCheckpointIO

from revdeq_lightning.checkpoints.files import other_checkpoint, read_checkpoint, write_checkpoint
from revdeq_lightning.checkpoints.names import is_sharded_checkpoint
from revdeq_lightning.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically and with checksums, and loads them without running code from them.

    Lightning's own plugin writes into the system's temporary folder and moves the file. Across file systems the move is
    a copy, which a crash or a full disk truncates.

    Args:
        errors: If a file cannot be written: "raise", or "warn" and keep the error in `failures`. Runs with several
            processes need "warn": only the first process writes, and the others would wait for it forever.
    """

    def __init__(self, *, errors: Literal["raise", "warn"] = "raise") -> None:
        if errors not in ("raise", "warn"):
            raise ValueError(f"errors must be 'raise' or 'warn', got {errors!r}")
        self.errors = errors
        self.failures: dict[Path, OSError] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save to a local path; raise TypeError for storage options, which local files do not have."""
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
        """Verify and read a checkpoint; if it is damaged or not one, a CheckpointError names another to use."""
        if weights_only is False:
            raise ValueError("weights_only=False would run code from the checkpoint: remove it")
        if is_sharded_checkpoint(path):
            raise CheckpointError(f"{path} is a sharded checkpoint (a folder): load it with EquilibriumFSDP2")
        try:
            content = read_checkpoint(path, map_location)
            is_result = Path(path).name == ".temp.ckpt"  # the weights that Lightning's forked processes return
            if not is_result and not {"state_dict", "pytorch-lightning_version"} <= content.keys():
                raise CheckpointError(
                    f"{path} is not the checkpoint of a training run but weights alone, as `export` writes them, or"
                    " another file: use one in RUN/checkpoints"
                )
            return content
        except CheckpointError as error:
            raise CheckpointError(f"{error}{other_checkpoint(path)}") from None

    def note(self, path: Path, error: OSError | None) -> None:
        """Raise, or warn of, the error that prevented a checkpoint from being written; None if it was written."""
        if error is None:
            self.failures.pop(path, None)
            return
        if self.errors == "raise":
            raise error
        self.failures[path] = error
        kept = "the previous one is intact" if path.exists() else "there is no file of this name"
        warnings.warn(
            f"no checkpoint was written to {path}: {error.strerror or error}; {kept}. Training continues, and "
            "the next save tries again.",
            stacklevel=3,
        )
