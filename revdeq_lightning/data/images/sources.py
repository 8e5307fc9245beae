"""Sources of labeled images: the embedded digits, CIFAR, folders and archives, and Hugging Face datasets."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from revdeq_lightning.data.images.batches import Content, ImageCollection, ImageSource, ImageTable, numbered_names
from revdeq_lightning.data.images.folder import open_folder
from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.loading.files import SPLITS, huggingface_key, load_huggingface

IMAGE_SOURCES = ("digits", "cifar10", "cifar100", "folder", "huggingface")

KNOWN_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the 50,000 training images per channel, on the scale 0 ... 1."""


def open_image_source(
    source: str,
    path: str | None,
    *,
    dataset_name: str | None,
    image_column: str | None,
    label_column: str | None,
    download: bool,
) -> ImageSource:
    """Open one of the `IMAGE_SOURCES`, with the arguments of `ImageDataModule`."""
    if source == "digits":
        return ImageSource(lambda: "digits", _read_digits, channels=1)
    if source == "folder":
        return open_folder(Path(str(path)))
    if source == "huggingface":
        columns = image_column, label_column
        read = partial(_read_huggingface, str(path), dataset_name, *columns)
        return ImageSource(lambda: f"{huggingface_key(str(path), dataset_name)}:{columns}", read)
    # The published MD5 is verified, so the name identifies the content.
    return ImageSource(lambda: source, partial(_read_cifar, source, Path(path or "data"), download))


def _pixels_table(prefix: str, pixels: Any, labels: Any) -> ImageTable:
    number = len(pixels)
    return ImageTable(
        numbered_names(prefix, number, 5), np.asarray(labels, np.int64), np.arange(number), pixels.__getitem__
    )


def _read_digits() -> ImageCollection:
    """Open the digits; a fixed permutation selects a sixth of them for the test split."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = _pixels_table("digits", pixels, digits.target)
    order = Draws(0, 0).permutation(len(pixels))
    num_test = 297
    tables = {"train": everything.take(np.sort(order[num_test:])), "test": everything.take(np.sort(order[:num_test]))}
    return ImageCollection([str(digit) for digit in range(10)], tables)


def published_cifar(source: str) -> Any:
    """Torchvision's class, with the published names, URL, and checksums."""
    from torchvision.datasets import CIFAR10, CIFAR100

    return {"cifar10": CIFAR10, "cifar100": CIFAR100}[source]


def _read_cifar(source: str, path: Path, download: bool) -> ImageCollection:
    """Find `path/cifar-10-batches-py`, that folder itself, the archive, or its folder; else download to `path`."""
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    def intact(file: Path, md5: str) -> Path:
        if not check_integrity(file, md5):
            raise ValueError(f"{file} is damaged or a different file (its MD5 is not {md5}): remove it.")
        return file

    published = published_cifar(source)
    root = path.parent if path.name == published.base_folder else path
    if (root / published.base_folder).is_dir():
        files = [*published.train_list, *published.test_list, (published.meta["filename"], published.meta["md5"])]
        for name, md5 in files:
            intact(root / published.base_folder / name, md5)
        splits = {split: published(root, train=split == "train") for split in ("train", "test")}
        tables = {split: _pixels_table(f"{source}/{split}", part.data, part.targets) for split, part in splits.items()}
        return ImageCollection(list(splits["train"].classes), tables)
    archive = path if path.is_file() else path / published.filename
    if not archive.is_file():
        advice = (
            f"put {published.filename} (MD5 {published.tgz_md5}) into {path}/, or try the embedded images: "
            "make train-cifar CONFIG=configs/digits/default.yaml"
        )
        if not download:
            fault = f"no {published.base_folder}/ and no {archive.name} in {path} (download is false)"
            raise FileNotFoundError(f"{fault}: {advice}")
        part = archive.with_name(f"{archive.name}.part")
        try:
            download_url(published.url, str(path), part.name, published.tgz_md5)
            part.rename(archive)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            raise ConnectionError(f"cannot download {published.url} ({error}): {advice}") from None
    with TemporaryDirectory() as folder:
        try:
            extract_archive(str(intact(archive, published.tgz_md5)), folder)
        except OSError as error:
            fault = f"{archive} cannot be unpacked into {folder} ({error.strerror})"
            raise ValueError(f"{fault}: set TMPDIR to another folder, or unpack it where it is.") from None
        return _read_cifar(source, Path(folder), download=False)


def _read_huggingface(
    path: str, name: str | None, image_column: str | None, label_column: str | None
) -> ImageCollection:
    import datasets

    loaded = load_huggingface(path, name)
    features = loaded["train"].features
    image_column = _column(path, features, "image_column", image_column, "Image")
    label_column = _column(path, features, "label_column", label_column, "ClassLabel")
    values = {
        split: _labels(path, split, label_column, loaded[split].with_format(None)[label_column][:])
        for split in SPLITS
        if split in loaded and len(loaded[split])
    }
    class_names, labels = _number_classes(path, label_column, values, getattr(features[label_column], "names", None))
    left_out = []
    if unused := sorted(set(loaded) - set(labels)):
        left_out = [
            f"{path} has splits that are not used ({', '.join(unused)}): they are empty, have no labels, or names "
            f"other than those of {', '.join(SPLITS)}."
        ]
        rank_zero_warn(left_out[0])
    tables = {}
    for split, numbers in labels.items():
        encoded = loaded[split].cast_column(image_column, datasets.Image(decode=False))
        names, rows = numbered_names(split, len(numbers), 8), np.arange(len(numbers))
        tables[split] = ImageTable(names, numbers, rows, partial(_read_row, encoded, image_column))
    return ImageCollection(class_names, tables, left_out)


def _read_row(dataset: Any, column: str, row: np.int64) -> Content:
    value = dataset[int(row)][column] or {"bytes": b""}  # a row without an image
    return bytes(value["bytes"]) if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _labels(path: str, split: str, column: str, values: Sequence[Any]) -> NDArray[Any]:
    for row, value in enumerate(values):
        if not isinstance(value, int | str):
            fault = "rows without a label" if value is None else "labels that are neither integers nor names"
            advice = f"every row needs a class of train, row {row} has {value!r:.60}"
            raise ValueError(f'{path}, {split}: {fault} (column "{column}"); {advice}.')
    return np.asarray(values)


def _number_classes(
    path: str, column: str, values: dict[str, NDArray[Any]], class_names: list[str] | None
) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """Names of the classes, and each split's labels; splits without labels (all -1) are omitted."""
    if class_names is not None:
        values = {split: labels for split, labels in values.items() if split == "train" or (labels != -1).any()}
    known = np.unique(values["train"]) if class_names is None else np.arange(len(class_names))
    numbered = {}
    for split, labels in values.items():
        if (unknown := np.setdiff1d(labels, known)).size:
            fault = f"the class {unknown[0]}, which train lacks"
            raise ValueError(f'{path}, {split}: {fault} (column "{column}"); every row needs a class of train.')
        numbered[split] = np.searchsorted(known, labels).astype(np.int64)
    return class_names or [str(value) for value in known.tolist()], numbered


def _column(path: str, features: Any, argument: str, name: str | None, kind: str) -> str:
    """The column of that name; without a name, the only column of that feature type."""
    if name is not None:
        if name not in features:
            raise ValueError(f'{path} has the columns {sorted(features)}, {argument} "{name}" is not among them.')
        return name
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if not found and kind == "ClassLabel":
        found = [column for column in ("label", "labels", "fine_label") if column in features]
    if len(found) != 1:
        raise ValueError(f"{path} has the columns {sorted(features)}: say which one with {argument}.")
    return str(found[0])
