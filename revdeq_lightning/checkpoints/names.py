"""Names in a folder of checkpoints."""

CHECKPOINTS = "checkpoints"
"""Name of that folder in a run's."""

BEST, LAST = "best.ckpt", "last.ckpt"
ASIDE = f".{LAST}.old"  # all that a run killed in an unlucky moment may have, see `files.put_in_place`
