"""Tables of labeled images, the common output of all image sources, and their splits."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Content = bytes | NDArray[np.uint8]
"""An encoded image, or pixels of shape `(height, width, channels)`."""


class ImageTable(NamedTuple):
    """Labeled images of one split: image i is `read(places[i])`.

    Attributes:
        names: Bytes, independent of the location of the data; they determine the split of an image.
        labels: Classes, int64.
        places: Locations for `read`.
        read: Returns one image. Picklable, so that worker processes can read.
    """

    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    places: NDArray[Any]
    read: Callable[[Any], Content]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "ImageTable":
        """The table of only these images."""
        return ImageTable(self.names[indices], self.labels[indices], self.places[indices], self.read)


class ImageCollection(NamedTuple):
    """The splits of a source ("train" at least), and lines on what is not among them."""

    class_names: list[str]
    tables: dict[str, ImageTable]
    left_out: Sequence[str] = ()


class ImageSource(NamedTuple):
    """Images that have not been listed yet.

    Attributes:
        key: Computes an identifier of the content; may read all of it.
        open: Lists the images.
        channels: 1 gray, 3 RGB.
    """

    key: Callable[[], str]
    open: Callable[[], ImageCollection]
    channels: int = 3


def numbered_names(prefix: str, count: int, digits: int) -> NDArray[np.bytes_]:
    """Names for unnamed images: `prefix/000...`."""
    return np.array([f"{prefix}/{number:0{digits}d}".encode() for number in range(count)])


def split_images(
    tables: dict[str, ImageTable],
    *,
    validation_fraction: float,
    split_seed: int,
    max_train_images: int | None,
    max_eval_images: int | None,
) -> dict[str, ImageTable]:
    """Split validation images from the training images if there are none, then reduce to the given sizes.

    Both are stratified by class and depend only on names and `split_seed`.
    """
    tables = dict(tables)
    train = tables["train"]
    if "validation" not in tables and (count := round(validation_fraction * len(train))):
        chosen = stratified_subset(train, count, split_seed)
        tables["validation"] = train.take(chosen)
        tables["train"] = train.take(np.setdiff1d(np.arange(len(train)), chosen))
    for split, table in tables.items():
        limit = max_train_images if split == "train" else max_eval_images
        if limit is not None and limit < len(table):
            tables[split] = table.take(stratified_subset(table, limit, split_seed))
        if not len(table):
            fraction = f"validation_fraction {validation_fraction}"
            raise ValueError(f"no images are left for {split} ({fraction}): use more images, or another fraction.")
    return tables


def stratified_subset(table: ImageTable, count: int, seed: int) -> NDArray[np.int64]:
    """Indices of exactly `count` images, stratified by class, in ascending order.

    Selects the images of a class whose names have the smallest hashes.
    """
    sizes = np.bincount(table.labels)
    shares = sizes * count / max(1, len(table))
    wanted = shares.astype(np.int64)
    largest_remainders = np.argsort(wanted - shares, kind="stable")
    wanted[largest_remainders[: count - wanted.sum()]] += 1
    hashes = [hashlib.sha256(f"{seed}:".encode() + name).digest() for name in table.names.tolist()]
    by_hash = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64)
    chosen = [by_hash[table.labels[by_hash] == label][:number] for label, number in enumerate(wanted)]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
