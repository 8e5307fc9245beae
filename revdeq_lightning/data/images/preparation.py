"""Prepare datasets from a source: decoded images in a folder, and statistics of the training images."""

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from revdeq_lightning.data.images.batches import DecodedImages, PreparedImages
from revdeq_lightning.data.images.decoding import ImageSizes, skipped_message
from revdeq_lightning.data.images.tables import ImageCollection
from revdeq_lightning.data.loading.array_cache import ArrayWriter, load_or_build
from revdeq_lightning.data.loading.base import digest
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX

_CACHE_FORMAT = 2
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageData(NamedTuple):
    """Datasets by split, and their properties; mean and standard deviation are per channel, on the scale 0 ... 1.

    The checksums are of the training split's labels and images (of their names if images are decoded on demand).
    """

    class_names: list[str]
    channels: int
    mean: list[float]
    std: list[float]
    datasets: dict[str, PreparedImages] | dict[str, DecodedImages]
    checksums: dict[str, str]
    left_out: list[str]


def prepare_in_memory(
    folder: Path, name: str, key: Any, collect: Callable[[], ImageCollection], sizes: ImageSizes, skip_undecodable: bool
) -> ImageData:
    """Decode all images that `collect` lists for evaluation into `folder`, unless it has those of this `key`."""
    content = digest([_CACHE_FORMAT, key, sizes._asdict(), skip_undecodable])
    path = folder / f"{name}-{sizes.image_size}px-{content}.arrays"
    cache = load_or_build(path, partial(_decode_all, path, collect, sizes, skip_undecodable))
    if skipped := cache.metadata["skipped"]:
        rank_zero_warn(skipped_message(skipped))
    datasets = {
        split: PreparedImages(cache.arrays[split], cache.arrays[f"{split}.labels"], training=split == "train")
        for split in cache.metadata["splits"]
    }
    mean, std, class_names = (cache.metadata[name] for name in ("mean", "std", "class_names"))
    checksums = {"image_checksum": cache.checksums["train"], "label_checksum": cache.checksums["train.labels"]}
    left_out = [*cache.metadata["left_out"], *([skipped_message(skipped)] if skipped else [])]
    return ImageData(class_names, sizes.channels, mean, std, datasets, checksums, left_out)


def prepare_decoding(
    collection: ImageCollection,
    sizes: ImageSizes,
    *,
    crop_scale: tuple[float, float] | None,
    seed: int,
    skip_undecodable: bool,
) -> ImageData:
    """Datasets that decode on demand, with ImageNet's statistics and the arguments of `DecodedImages`."""
    class_names, tables, left_out = collection
    if getattr(tables["train"].read, "temporary", None):
        fault = "images of a compressed archive cannot be decoded as they are needed"
        raise ValueError(f"{fault}: set in_memory to true, or use the unpacked folder or an uncompressed .tar.")
    options: dict[str, Any] = {"crop_scale": crop_scale, "seed": seed, "skip_undecodable": skip_undecodable}
    datasets = {s: DecodedImages(table, sizes, training=s == "train", **options) for s, table in tables.items()}
    gray = sizes.channels == 1
    mean, std = ([float(np.mean(v))] if gray else list(v) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    names, labels = tables["train"].names.tolist(), tables["train"].labels.astype(np.int64)
    checksums = {
        "name_checksum": f"{zlib.crc32(b''.join(name + bytes(1) for name in names)):08x}",
        "label_checksum": f"{zlib.crc32(labels.data):08x}",
    }
    return ImageData(class_names, sizes.channels, mean, std, datasets, checksums, list(left_out))


def _decode_all(
    path: Path, collect: Callable[[], ImageCollection], sizes: ImageSizes, skip_undecodable: bool, writer: ArrayWriter
) -> dict[str, Any]:
    class_names, tables, left_out = collect()
    rank_zero_info(f"Decoding {sum(map(len, tables.values()))} images into {path} (once) ...")
    skipped: list[str] = []
    counts = np.zeros((sizes.channels, 256))  # of the values in each channel of the training images
    for split, table in tables.items():
        dataset, num_decoded = DecodedImages(table, sizes, skip_undecodable=skip_undecodable), 0
        for start in range(0, len(table), 256):
            batch = dataset[list(range(start, min(start + 256, len(table))))]
            decoded = batch.labels != IGNORE_INDEX
            images, num_decoded = batch.images[decoded].numpy(), num_decoded + int(decoded.sum())
            writer.append(split, images)
            writer.append(f"{split}.labels", batch.labels[decoded].numpy())
            if split == "train":
                counts += [np.bincount(channel.ravel(), minlength=256) for channel in images.swapaxes(0, 1)]
        skipped += dataset.take_skipped()
        if not num_decoded:
            raise ValueError(f"none of the {len(table)} images of {split} can be decoded (such as {skipped[-1]}).")
    shares, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1)).clip(min=1 / 255)  # images of one color have 0
    statistics = {"mean": mean.tolist(), "std": std.tolist()}
    metadata = {"class_names": class_names, "splits": list(tables), "skipped": skipped, "left_out": list(left_out)}
    return metadata | statistics
