"""File names in a checkpoint folder."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Name of the folder, within that of the run."""

BEST, LAST = "best.ckpt", "last.ckpt"
ASIDE = f".{LAST}.old"  # a run killed in `files.put_in_place` may have only this one

REST, SUMS = "meta.pt", "SHA256SUMS"
"""Files of a sharded checkpoint: all values except tensors, and the checksums; the first process writes both."""


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether the path is a sharded checkpoint, which is a folder."""
    return (Path(path) / REST).is_file()
