"""Data modules for text, images and puzzles, in a reproducible and resumable order."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.data.images.augmentation import AugmentationConfig as AugmentationConfig
    from revdeq_lightning.data.images.batches import ImageBatch as ImageBatch
    from revdeq_lightning.data.images.module import ImageDataModule as ImageDataModule
    from revdeq_lightning.data.loading.base import AbstractDataModule as AbstractDataModule
    from revdeq_lightning.data.puzzles.module import PuzzleBatch as PuzzleBatch, PuzzleDataModule as PuzzleDataModule
    from revdeq_lightning.data.text.module import TextBatch as TextBatch, TextDataModule as TextDataModule

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
