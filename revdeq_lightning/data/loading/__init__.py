"""Common code for text and images: batches in a resumable order, file sources, and arrays cached on disk."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.data.loading.base import AbstractDataModule as AbstractDataModule
    from revdeq_lightning.data.loading.sampler import (
        ResumableBatchSampler as ResumableBatchSampler,
        ResumableLoader as ResumableLoader,
    )

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
