"""Names in a folder of checkpoints."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Name of that folder in a run's."""

BEST, LAST = "best.ckpt", "last.ckpt"
ASIDE = f".{LAST}.old"  # all that a run killed in an unlucky moment may have, see `files.put_in_place`

REST, SUMS = "meta.pt", "SHA256SUMS"
"""In a folder of shards: all that is not a tensor, and the checksums of its files; both by the first process."""


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether this is a folder that a sharded checkpoint was written to."""
    return (Path(path) / REST).is_file()
