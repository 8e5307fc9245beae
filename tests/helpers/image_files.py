"""Folders and archives of images that a test makes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from revdeq_lightning.data.images.module import ImageBatch, ImageDataModule

CLASSES = ("ant", "bee", "cat")


def pixels(number: int, width: int = 40, height: int = 32) -> np.ndarray:
    """Smooth colours that differ from number to number, so that JPEG keeps them apart."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(2 * np.pi * (x * (1 + number % 3) + y + number * 0.17 * (c + 1))) for c in range(3)]
    return (127 + 90 * np.stack(waves, -1) + 7 * (number % 5)).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, suffix: str = "jpg", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    image.save(stream, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
    return stream.getvalue()


def make_folder(root: Path, splits: dict[str, int] | None = None, classes=CLASSES, suffix: str = "jpg") -> Path:
    """`splits`: images a class below each folder ("" for the root itself), sizes differ."""
    number = 0
    for split, count in (splits or {"train": 10, "val": 3, "test": 2}).items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = pixels(number, 36 + number % 7, 33 + number % 4)
                (folder / f"{index:03d}.{suffix}").write_bytes(encoded(image, suffix))
                number += 1
    return root


def make_archive(folder: Path, path: Path, prefix: str = "") -> Path:
    """Members in another order than the names', so that nothing relies on it."""
    mode = {".gz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:
        for file in sorted(folder.rglob("*"), key=lambda file: (file.name, file.parent)):
            archive.add(file, prefix + file.relative_to(folder).as_posix(), recursive=False)
    return path


def whole(loader):
    """All batches as one."""
    batches = list(loader)
    return ImageBatch(*(torch.cat(field) for field in zip(*batches, strict=True)))


def split(data, name):
    """All images of a split in order, uint8, and their labels."""
    batch = whole(data._evaluation_loader(name))
    data.teardown("fit")
    return batch.images, batch.labels


def assert_same_splits(ours, other):
    assert ours.splits == other.splits
    assert ours.class_names == other.class_names
    for name in ours.splits:
        for a, b in zip(split(ours, name), split(other, name), strict=True):
            assert torch.equal(a, b)


def builder(folder: Path, cache: Path):
    """Builds a data module on the folder, or on other sources."""

    def build(path=None, **arguments):
        if arguments.get("source", "folder") == "folder":
            path = path or folder
        if path:
            arguments["path"] = str(path)
        defaults = {"source": "folder", "batch_size": 4, "image_size": 16, "cache_dir": str(cache)}
        return ImageDataModule(**defaults | arguments)

    return build
