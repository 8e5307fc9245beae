"""Checkpoint files, sharded checkpoint folders, and the callbacks that write them."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.checkpoints.callbacks import (
        BestCheckpoint as BestCheckpoint,
        LastCheckpoint as LastCheckpoint,
    )
    from revdeq_lightning.checkpoints.io import AtomicCheckpointIO as AtomicCheckpointIO

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
