"""Images of a Hugging Face dataset, from the Hub or a local copy."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from revdeq_lightning.data.images.tables import Content, ImageCollection, ImageSource, ImageTable, numbered_names
from revdeq_lightning.data.loading.files import SPLITS, huggingface_key, load_huggingface


def open_huggingface(path: str, name: str | None, image_column: str | None, label_column: str | None) -> ImageSource:
    """Open the dataset, with the arguments of `ImageDataModule`."""
    columns = image_column, label_column
    return ImageSource(lambda: f"{huggingface_key(path, name)}:{columns}", partial(_open, path, name, *columns))


def _open(path: str, name: str | None, image_column: str | None, label_column: str | None) -> ImageCollection:
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
        tables[split] = ImageTable(names, numbers, rows, partial(_read, encoded, image_column))
    return ImageCollection(class_names, tables, left_out)


def _read(dataset: Any, column: str, row: np.int64) -> Content:
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
