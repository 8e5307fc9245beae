"""Where labelled images come from: embedded digits, CIFAR, folders and archives of folders, Hugging Face datasets."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from revdeq_lightning.data.loading.sampler import shuffled

IMAGE_SOURCES = ("digits", "cifar10", "cifar100", "folder", "huggingface")

Content = bytes | NDArray[np.uint8]
"""An encoded image, or pixels of shape `(height, width, channels)`."""


class AbstractImageReader(ABC):
    """Images by position. Pickles, so that worker processes read."""

    random_access = True
    """False: only `stream` is fast."""

    @abstractmethod
    def name(self, position: int) -> str:
        """Name of the image, the same wherever the data lies; decides in which split it falls."""

    @abstractmethod
    def read(self, position: int) -> Content:
        """One image."""

    def stream(self, positions: Sequence[int]) -> Iterator[tuple[int, Content]]:
        """(index into `positions`, image) for all of them, in whatever order is fast."""
        for index, position in enumerate(positions):
            yield index, self.read(position)


class ImageTable(NamedTuple):
    """Labelled images of one split.

    Attributes:
        reader: Where they are.
        positions: In the reader, int64.
        labels: Classes, int64.
    """

    reader: AbstractImageReader
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]

    def name(self, index: int) -> str:
        """Name of an image."""
        return self.reader.name(int(self.positions[index]))

    def take(self, indices: NDArray[np.int64]) -> "ImageTable":
        """Those images only."""
        return ImageTable(self.reader, self.positions[indices], self.labels[indices])


class ImageCollection(NamedTuple):
    """The splits that a source has ("train" at least), and what it says of them."""

    class_names: list[str]
    tables: dict[str, ImageTable]


class ImageSource(NamedTuple):
    """Images that are not looked at yet.

    Attributes:
        key: Computes what identifies the content; may read all of it.
        open: Lists the images.
        channels: Of the images: 1 grey, 3 RGB.
    """

    key: Callable[[], str]
    open: Callable[[], ImageCollection]
    channels: int = 3


class ArrayReader(AbstractImageReader):
    """Pixels in memory, uint8 `(number, height, width, channels)`."""

    def __init__(self, pixels: NDArray[np.uint8], prefix: str) -> None:
        self.pixels, self.prefix = pixels, prefix

    def name(self, position: int) -> str:
        """Prefix and number."""
        return f"{self.prefix}/{position:05d}"

    def read(self, position: int) -> Content:
        """The pixels."""
        pixels: NDArray[np.uint8] = self.pixels[position]
        return pixels


def open_image_source(
    source: str,
    path: str | None,
    *,
    dataset_name: str | None,
    image_column: str | None,
    label_column: str | None,
    download: bool,
) -> ImageSource:
    """Open one of the `IMAGE_SOURCES`; the arguments are those of `ImageDataModule`."""
    from revdeq_lightning.data.images import cifar, folder, huggingface

    if source == "digits":
        return ImageSource(lambda: "digits", _open_digits, channels=1)
    if source == "folder":
        return folder.open_folder(Path(str(path)))
    if source == "huggingface":
        return huggingface.open_huggingface(str(path), dataset_name, image_column, label_column)
    return cifar.open_cifar(source, path, download)


def _open_digits() -> ImageCollection:
    """A sixth of the images, by a fixed permutation, is the test split."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = ImageTable(ArrayReader(pixels, "digits"), np.arange(len(pixels)), digits.target.astype(np.int64))
    order = shuffled(len(pixels), seed=0, epoch=0)
    num_test = 297
    tables = {"train": everything.take(np.sort(order[num_test:])), "test": everything.take(np.sort(order[:num_test]))}
    return ImageCollection([str(digit) for digit in range(10)], tables)


def split_images(
    tables: dict[str, ImageTable],
    *,
    validation_fraction: float,
    split_seed: int,
    max_train_images: int | None,
    max_eval_images: int | None,
) -> dict[str, ImageTable]:
    """Split off a validation part of the training images if there is none, then cut to the sizes that are wanted.

    Both keep the classes' shares and depend on names and `split_seed` alone.
    """
    tables = dict(tables)
    train = tables["train"]
    if "validation" not in tables:
        count = round(validation_fraction * len(train.labels))
        chosen = stratified_subset(train, count, split_seed)
        if count:
            tables["validation"] = train.take(chosen)
            tables["train"] = train.take(np.setdiff1d(np.arange(len(train.labels)), chosen))
    for split, table in tables.items():
        limit = max_train_images if split == "train" else max_eval_images
        if limit is not None and limit < len(table.labels):
            tables[split] = table.take(stratified_subset(table, limit, split_seed))
        if not len(table.labels):
            raise ValueError(
                f"no images are left for {split} (validation_fraction {validation_fraction}): use more images, or "
                "another fraction."
            )
    return tables


def stratified_subset(table: ImageTable, count: int, seed: int) -> NDArray[np.int64]:
    """Indices of exactly `count` images, of each class as close to its share as that allows, ascending.

    Within a class, those whose names have the smallest hashes.
    """
    sizes = np.bincount(table.labels)
    shares = sizes * count / max(1, len(table.labels))
    wanted = shares.astype(np.int64)
    largest_remainders = np.argsort(wanted - shares, kind="stable")
    wanted[largest_remainders[: count - wanted.sum()]] += 1
    hashes = [hashlib.sha256(f"{seed}:{table.name(i)}".encode()).digest() for i in range(len(table.labels))]
    by_hash = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64)
    chosen = [by_hash[table.labels[by_hash] == label][:number] for label, number in enumerate(wanted)]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
