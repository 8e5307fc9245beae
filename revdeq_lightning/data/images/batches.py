"""Tables of labeled images, the common output of all sources; batches, read from a memory map or decoded on demand."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from revdeq_lightning.data.images import decoding
from revdeq_lightning.data.images.augmentation import random_box, uniform
from revdeq_lightning.data.loading.array_cache import StoredArray
from revdeq_lightning.data.loading.files import text_of
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX, PADDING

Content = bytes | NDArray[np.uint8]
"""An encoded image, or pixels of shape `(height, width, channels)`."""


class ImageTable(NamedTuple):
    """Labeled images of one split: image i is `read(places[i])`, also in worker processes, to which `read` is pickled.

    The names are independent of the location of the data; they determine the split of an image.
    """

    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    places: NDArray[Any]
    read: Callable[[Any], Content]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "ImageTable":
        return ImageTable(self.names[indices], self.labels[indices], self.places[indices], self.read)


class ImageCollection(NamedTuple):
    """The splits of a source ("train" at least), and lines on what is not among them."""

    class_names: list[str]
    tables: dict[str, ImageTable]
    left_out: Sequence[str] = ()


class ImageSource(NamedTuple):
    """Images that `open` lists; `key` identifies their content and may read all of it; 1 channel is gray, 3 are RGB."""

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
    if "validation" not in tables and validation_fraction:
        count = round(validation_fraction * len(train))
        if not count:
            raise ValueError(
                f"validation_fraction={validation_fraction} of {len(train):,} images is none: set it to 0, or raise it"
            )
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


class ImageBatch(NamedTuple):
    """Images and their classes; a mixed image has two.

    Attributes:
        images: `(batch, channels, height, width)`: uint8 from the loader, float32, augmented and normalized, after
            `ImageDataModule.on_after_batch_transfer`.
        labels: int64 `(batch,)`; `IGNORE_INDEX` for padding.
        partner_labels: int64 `(batch,)`: class of the image mixed in; `labels` without mixing.
        weights: float32 `(batch,)`: share of `labels` in the mix; 1 without mixing.
        keys: int64: `(batch, 1)` in training, `epoch * number of images + image`, which determines all random numbers;
            `(batch, 0)` in evaluation, which is deterministic.
    """

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    weights: Tensor
    keys: Tensor


class PreparedImages(Dataset[ImageBatch]):
    """Decoded images of one size. Indices continue through the epochs if `training`."""

    def __init__(self, images: StoredArray, labels: StoredArray, *, training: bool) -> None:
        self.images, self.labels, self.training = images, labels, training

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> ImageBatch:
        keys = np.asarray(indices, dtype=np.int64)
        items = np.where(keys == PADDING, 0, keys % len(self))
        labels = np.where(keys == PADDING, IGNORE_INDEX, self.labels.array[items])
        return _batch(self.images.array[items], labels, keys, self.training)


class DecodedImages(Dataset[ImageBatch]):
    """Images that are decoded on demand. Indices continue through the epochs if `training`.

    `crop_scale` is the range of the area fraction of a random crop in training; None: center crop. With
    `skip_undecodable`, an image that cannot be decoded is replaced by a black one with `IGNORE_INDEX`, and
    `take_skipped` names it, also from worker processes.
    """

    def __init__(
        self,
        table: ImageTable,
        sizes: decoding.ImageSizes,
        *,
        training: bool = False,
        crop_scale: tuple[float, float] | None = None,
        seed: int = 0,
        skip_undecodable: bool,
    ) -> None:
        self.table, self.sizes, self.training, self.seed = table, sizes, training, seed
        self.crop_scale = crop_scale if training else None
        self.undecodable: Tensor | None = None
        if skip_undecodable:
            self.undecodable = torch.zeros(len(table), dtype=torch.bool)
            self.undecodable.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, indices: list[int]) -> ImageBatch:
        keys = np.asarray(indices, dtype=np.int64)
        channels, size, resize = self.sizes
        images = np.zeros((len(keys), channels, size, size), np.uint8)
        labels = np.full(len(keys), IGNORE_INDEX, np.int64)
        draws = uniform(torch.from_numpy(keys), self.seed, "crop", 4)
        for row, key in enumerate(indices):
            if key == PADDING:
                continue
            item = key % len(self)
            try:
                image = decoding.decode_image(self.table.read(self.table.places[item]), self._name(item), channels)
            except decoding.UndecodableImageError:
                if self.undecodable is None:
                    raise
                self.undecodable[item] = True
                continue
            labels[row] = self.table.labels[item]
            if self.crop_scale is None:
                images[row] = decoding.evaluation_transform(image, size, resize)
            else:
                left, top, width, height = random_box(draws[row], *image.size, self.crop_scale).tolist()
                box = (left, top, left + width, top + height)
                images[row] = decoding.to_array(image.resize((size, size), decoding.RESAMPLING, box=box))
        return _batch(images, labels, keys, self.training)

    def take_skipped(self) -> list[str]:
        """Names of the images that could not be decoded since the last call."""
        if self.undecodable is None:
            return []
        names = [self._name(index) for index in self.undecodable.nonzero().flatten().tolist()]
        self.undecodable.zero_()
        return names

    def _name(self, item: int) -> str:
        return text_of(os.fsdecode(self.table.names[item]))


def _batch(images: NDArray[np.uint8], labels: NDArray[np.int64], keys: NDArray[np.int64], training: bool) -> ImageBatch:
    labels_B, keys_BK = torch.from_numpy(labels), torch.from_numpy(keys)[:, None]
    return ImageBatch(
        torch.from_numpy(images), labels_B, labels_B, torch.ones(len(keys)), keys_BK if training else keys_BK[:, :0]
    )


class PreprocessedFiles(NamedTuple):
    """The decoded files, and the model's input, float32 `(batch, channels, height, width)`."""

    paths: list[Path]
    images: Tensor


def preprocess_files(
    paths: Iterable[str | os.PathLike[str]], state: dict[str, Any], *, undecodable: Literal["raise", "skip"] = "raise"
) -> PreprocessedFiles:
    """Decode the files of one batch as evaluation does, by `ImageDataModule.preprocessing_state()` of a checkpoint.

    For a file that cannot be decoded, "raise" an error, or "skip" it with a warning that names it.
    """
    files = [Path(path) for path in paths]
    names, numbers = np.array([os.fsencode(file) for file in files]), np.arange(len(files))
    table = ImageTable(names, numbers, numbers, lambda number: files[number].read_bytes())
    sizes = decoding.ImageSizes(state["channels"], state["image_size"], state["resize"])
    dataset = DecodedImages(table, sizes, skip_undecodable=undecodable == "skip")
    batch = dataset[numbers.tolist()]
    if skipped := dataset.take_skipped():
        warnings.warn(decoding.skipped_message(skipped), stacklevel=2)
    decoded = batch.labels != IGNORE_INDEX
    images = decoding.normalize(batch.images[decoded], state["mean"], state["std"])
    return PreprocessedFiles([files[number] for number in batch.labels[decoded].tolist()], images)
