"""Puzzles from files: npz archives, and Sudoku-Extreme's tables."""

import csv
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from revdeq_lightning.data.loading.files import hub_file, split_of
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX

Arrays = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Inputs and targets of several puzzles, of one shape: `(puzzles, length)` or `(puzzles, height, width)`."""


def read_npz(path: str | Path, *, need_targets: bool = True) -> Arrays:
    """Read the arrays `inputs` and `targets` of an npz archive; missing targets become targets that do not count.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an archive of such arrays.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: use an npz archive with the integer arrays inputs and targets")
    try:
        with zipfile.ZipFile(path), np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an npz archive: {' '.join(str(error).split())}") from None
    missing = [name for name in ("inputs", "targets")[: 1 + need_targets] if name not in arrays]
    if missing:
        raise ValueError(
            f"{path} has no array {missing[0]!r} (it has {', '.join(sorted(arrays)) or 'none'}): save it by"
            " numpy.savez(FILE, inputs=..., targets=...)"
        )
    inputs = arrays["inputs"]
    targets = arrays.get("targets", np.full(inputs.shape, IGNORE_INDEX))
    for name, array in (("inputs", inputs), ("targets", targets)):
        if array.dtype.kind not in "iub":
            raise ValueError(f"{path}: {name} must be integers, got {array.dtype}")
    if inputs.ndim not in (2, 3) or 0 in inputs.shape:
        raise ValueError(f"{path}: inputs must have shape (N, L) or (N, H, W), got {inputs.shape}")
    if targets.shape != inputs.shape:
        raise ValueError(f"{path}: targets must have the shape of inputs, {inputs.shape}, got {targets.shape}")
    return inputs.astype(np.int64), targets.astype(np.int64)


def read_sudoku_tables(path: str, most: Mapping[str, int | None]) -> dict[str, Arrays]:
    """Read the splits of a data set with columns `question` and `answer` of 81 characters, digits or empty cells.

    Args:
        path: Of the hub, such as `sapientinc/sudoku-extreme`, or a folder with its `train.csv` and `test.csv`.
        most: How many rows to read of each split; None: all.

    Raises:
        FileNotFoundError: If there is no train.csv.
        ConnectionError: If the hub cannot be reached.
        ValueError: If a table does not hold Sudokus.
    """
    files = {split: _table(path, split) for split in ("train", "test")}
    if files["train"] is None:
        raise FileNotFoundError(f"{path} has no train.csv with the columns question and answer")
    return {split: _read_table(file, most[split]) for split, file in files.items() if file is not None}


def _table(path: str, split: str) -> Path | None:
    name, folder = f"{split}.csv", Path(path)
    if folder.is_dir():
        tables = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".csv")
        return next((file for file in tables if split_of(file.stem) == split), None)
    return hub_file(path, name, "set path=FOLDER with its train.csv and test.csv", "dataset")


def _read_table(path: Path, most: int | None) -> Arrays:
    try:
        with path.open(
            newline="", encoding="utf-8-sig"
        ) as file:  # not by `datasets`: it takes the answers for integers
            reader = csv.DictReader(file)
            missing = [column for column in ("question", "answer") if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} has no column {missing[0]!r}, it has {', '.join(reader.fieldnames or ())}")
            rows = [(row["question"] or "", row["answer"] or "") for row in islice(reader, most)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table in UTF-8 ({error}): save it as CSV in UTF-8") from None
    if not rows:
        raise ValueError(f"{path} has no puzzles")
    questions, answers = zip(*rows, strict=True)
    return _digits(path, questions), _digits(path, answers)


def _digits(path: Path, texts: Sequence[str]) -> NDArray[np.int64]:
    wrong = next((text for text in texts if len(text) != 81), None)
    if wrong is not None:
        raise ValueError(f"{path}: a Sudoku must have 81 characters, got {wrong!r}")
    codes = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8).reshape(-1, 9, 9)
    return np.where((codes > ord("0")) & (codes <= ord("9")), codes - ord("0"), 0).astype(np.int64)
