"""Labeled images: sources, decoding, augmentation, and their data module."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.data.images.augmentation import AugmentationConfig as AugmentationConfig
    from revdeq_lightning.data.images.batches import ImageBatch as ImageBatch, preprocess_files as preprocess_files
    from revdeq_lightning.data.images.decoding import find_images as find_images
    from revdeq_lightning.data.images.module import ImageDataModule as ImageDataModule

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
