"""Labeled images: sources, decoding, augmentation, and their data module."""
