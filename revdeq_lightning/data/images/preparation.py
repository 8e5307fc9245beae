"""From a source to data sets: splits, decoded images in one file, and the statistics of the training images."""

import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from revdeq_lightning.data.images.decoding import (
    ImageSizes,
    UndecodableImageError,
    decode_image,
    evaluation_transform,
    skipped_message,
)
from revdeq_lightning.data.images.store import DecodedImages, PreparedImages
from revdeq_lightning.data.images.tables import ImageCollection, ImageTable
from revdeq_lightning.data.loading.array_cache import load_or_build
from revdeq_lightning.data.loading.base import digest

_CACHE_FORMAT = 1
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageData(NamedTuple):
    """Data sets by split, and what is known of them.

    Attributes:
        class_names: In the order of their indices.
        channels: 1 grey, 3 RGB.
        mean: By channel.
        std: By channel.
        datasets: By split.
        checksums: Of the training split: `label_checksum`, and `image_checksum`, or `name_checksum` where images are
            decoded as they are needed: what is in those is not looked at.
    """

    class_names: list[str]
    channels: int
    mean: list[float]
    std: list[float]
    datasets: dict[str, PreparedImages] | dict[str, DecodedImages]
    checksums: dict[str, str]


def prepare_in_memory(
    folder: Path,
    name: str,
    key: Any,
    collect: Callable[[], ImageCollection],
    sizes: ImageSizes,
    *,
    skip_undecodable: bool,
) -> ImageData:
    """Decode all images by the evaluation's convention into a file, or find that it has been done.

    Args:
        folder: Where the file lies.
        name: Begins the file's name.
        key: Identifies source and splits; plain containers.
        collect: Lists the images of each split.
        sizes: What to make of each image.
        skip_undecodable: Whether to leave out, with a warning, what cannot be decoded.
    """
    content = digest([_CACHE_FORMAT, key, sizes._asdict(), skip_undecodable])
    path = folder / f"{name}-{sizes.image_size}px-{content}.safetensors"
    cache = load_or_build(path, partial(_decode_all, path, collect, sizes, skip_undecodable))
    if skipped := cache.metadata["skipped"]:
        rank_zero_warn(skipped_message(skipped))
    datasets = {
        split: PreparedImages(cache.arrays[split], cache.arrays[f"{split}/labels"], training=split == "train")
        for split in cache.metadata["splits"]
    }
    mean, std, class_names = (cache.metadata[name] for name in ("mean", "std", "class_names"))
    checksums = {"image_checksum": cache.checksum("train"), "label_checksum": cache.checksum("train/labels")}
    return ImageData(class_names, sizes.channels, mean, std, datasets, checksums)


def prepare_decoding(
    collection: ImageCollection,
    sizes: ImageSizes,
    *,
    crop_scale: tuple[float, float] | None,
    seed: int,
    skip_undecodable: bool,
) -> ImageData:
    """Data sets that decode as they go, with ImageNet's statistics; the arguments are those of `DecodedImages`."""
    if not all(table.reader.random_access for table in collection.tables.values()):
        raise ValueError(
            "a compressed archive is read in a row, its images cannot be decoded as they are needed: set in_memory to "
            "true, or give the unpacked folder or an uncompressed .tar."
        )
    datasets = {
        split: DecodedImages(
            table,
            sizes,
            training=split == "train",
            crop_scale=crop_scale,
            seed=seed,
            skip_undecodable=skip_undecodable,
        )
        for split, table in collection.tables.items()
    }
    grey = sizes.channels == 1
    mean, std = ([float(np.mean(v))] if grey else list(v) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    checksums = _checksums(collection.tables["train"])
    return ImageData(collection.class_names, sizes.channels, mean, std, datasets, checksums)


def _checksums(table: ImageTable) -> dict[str, str]:
    names = 0
    for index in range(len(table.labels)):
        names = zlib.crc32(os.fsencode(table.name(index)) + b"\0", names)
    labels = zlib.crc32(table.labels.astype(np.int64).data)
    return {"name_checksum": f"{names:08x}", "label_checksum": f"{labels:08x}"}


def _decode_all(
    path: Path, collect: Callable[[], ImageCollection], sizes: ImageSizes, skip_undecodable: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    class_names, tables = collect()
    number = sum(len(table.labels) for table in tables.values())
    rank_zero_info(f"Decoding {number} images into {path} (once) ...")
    images = {
        split: np.zeros((len(table.labels), sizes.channels, sizes.image_size, sizes.image_size), np.uint8)
        for split, table in tables.items()
    }
    is_decoded = {split: np.zeros(len(table.labels), dtype=bool) for split, table in tables.items()}
    for table, places in _by_reader(tables):
        for index, content in table.reader.stream(table.positions.tolist()):
            split, row = places[index]
            try:
                image = decode_image(content, table.name(index), sizes.channels)
            except UndecodableImageError:
                if not skip_undecodable:
                    raise
                continue
            images[split][row] = evaluation_transform(image, sizes.image_size, sizes.resize)
            is_decoded[split][row] = True
    arrays: dict[str, NDArray[Any]] = {}
    skipped = []
    for split, table in tables.items():
        good = is_decoded[split]
        skipped += [table.name(index) for index in np.flatnonzero(~good).tolist()]
        if not good.any():
            raise ValueError(f"none of the {len(good)} images of {split} can be decoded (such as {skipped[-1]}).")
        arrays[split] = images[split] if good.all() else images[split][good]
        arrays[f"{split}/labels"] = table.labels[good].astype(np.int64)
    mean, std = _statistics(arrays["train"])
    metadata = {"class_names": class_names, "splits": list(tables), "skipped": skipped, "mean": mean, "std": std}
    return arrays, metadata


def _by_reader(tables: dict[str, ImageTable]) -> list[tuple[ImageTable, list[tuple[str, int]]]]:
    """All images of each reader as one table, with split and row of each: an archive is read once for all splits."""
    joined = []
    for reader in {id(table.reader): table.reader for table in tables.values()}.values():
        parts = {split: table for split, table in tables.items() if table.reader is reader}
        positions = np.concatenate([table.positions for table in parts.values()])
        labels = np.concatenate([table.labels for table in parts.values()])
        places = [(split, row) for split, table in parts.items() for row in range(len(table.labels))]
        joined.append((ImageTable(reader, positions, labels), places))
    return joined


def _statistics(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, on the scale 0 ... 1."""
    counts = np.zeros((images.shape[1], 256))
    for start in range(0, len(images), 1024):  # a count converts its input to int64
        for channel in range(images.shape[1]):
            counts[channel] += np.bincount(images[start : start + 1024, channel].ravel(), minlength=256)
    shares, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    return mean.tolist(), std.clip(min=1 / 255).tolist()  # images of one colour have no spread
