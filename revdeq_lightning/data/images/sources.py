"""Where labelled images come from: embedded digits, CIFAR, folders and archives of folders, Hugging Face datasets."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from revdeq_lightning.data.images.tables import ArrayReader, ImageCollection, ImageSource, ImageTable
from revdeq_lightning.data.loading.sampler import shuffled

IMAGE_SOURCES = ("digits", "cifar10", "cifar100", "folder", "huggingface")


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
