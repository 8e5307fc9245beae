"""Checkpoint files, sharded checkpoint folders, and the callbacks that write them."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.checkpoints.best import BestCheckpoint as BestCheckpoint
    from revdeq_lightning.checkpoints.io import AtomicCheckpointIO as AtomicCheckpointIO
    from revdeq_lightning.checkpoints.last import LastCheckpoint as LastCheckpoint

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
