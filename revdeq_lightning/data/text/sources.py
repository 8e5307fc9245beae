"""Sources of text: the standard library's own source code, local files, or a Hugging Face dataset."""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from revdeq_lightning.data.loading.files import (
    SPLITS,
    huggingface_key,
    list_files,
    load_huggingface,
    names_of_splits,
    read_text,
)

SOURCES = ("python", "files", "huggingface")
_CODE_SUFFIXES = (
    ".py",
    ".ipynb",
    ".sh",
    ".yaml",
    ".yml",
    ".toml",
    ".cfg",
    ".c",
    ".cc",
    ".cpp",
    ".h",
    ".cu",
    ".rs",
    ".js",
)
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class TextSource(NamedTuple):
    """Text in splits that do not overlap.

    Attributes:
        key: Identifies the content.
        read: Returns the text of each split that exists, and lines on what was left out.
    """

    key: str
    read: Callable[[], tuple[dict[str, str], list[str]]]


def open_source(
    source: str,
    path: str | Sequence[str] | None,
    *,
    dataset_name: str | None,
    validation_path: str | Sequence[str] | None,
    test_path: str | Sequence[str] | None,
    validation_fraction: float,
    test_fraction: float,
) -> TextSource:
    """Open one of the `SOURCES`, with the arguments of `TextDataModule`."""
    fractions = validation_fraction, test_fraction
    if source == "huggingface":
        return TextSource(
            huggingface_key(str(path), dataset_name), lambda: _read_huggingface(str(path), dataset_name, fractions)
        )
    left_out: list[str] = []
    if source == "python":
        texts = _read_python(*fractions)
    else:
        paths = {"train": path, "validation": validation_path, "test": test_path}
        texts = {s: _joined(map(read_text, _find_files(p, left_out))) for s, p in paths.items() if p is not None}
        for split, text in texts.items():
            if not text:
                raise ValueError(f"the {split} text is empty ({paths[split]}): use a file with text.")
        texts = _cut_if_whole(texts, *fractions)
    digest = hashlib.sha256()
    for split, text in texts.items():
        digest.update(f"{split}:{len(text)}:".encode() + text.encode())
    return TextSource(digest.hexdigest(), lambda: (texts, left_out))


def _joined(texts: Iterable[str]) -> str:
    """One text, with a line end where a file without a final one is followed by another."""
    *before, last = [text for text in texts if text] or [""]
    return "".join(text if text.endswith(("\n", "\r")) else f"{text}\n" for text in before) + last


def _cut_if_whole(texts: dict[str, str], validation_fraction: float, test_fraction: float) -> dict[str, str]:
    """Split a text into training, validation, and test text, in this order."""
    if list(texts) != ["train"]:
        return texts
    text = texts["train"]
    train_end = int((1 - validation_fraction - test_fraction) * len(text))
    validation_end = int((1 - test_fraction) * len(text))
    parts = text[:train_end], text[train_end:validation_end], text[validation_end:]
    return {split: part for split, part in zip(SPLITS, parts, strict=True) if part}


def _read_python(validation_fraction: float, test_fraction: float) -> dict[str, str]:
    """Assign a file's split and position by the hash of its name: identical everywhere, similar across versions.

    In this order, a byte limit on the split selects files from the entire library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _NOT_LIBRARY
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            files.append((hashlib.sha256(file.relative_to(root).as_posix().encode()).digest(), file))
    if not files:
        raise FileNotFoundError(
            f'this Python has no source of its standard library under {root}: use source="files" with path=YOUR_TEXT.'
        )
    content: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name_hash, file in sorted(files):
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # the file declares another encoding
            continue
        place = int.from_bytes(name_hash[:8], "big") / 2**64
        is_validation = place < test_fraction + validation_fraction
        content["test" if place < test_fraction else "validation" if is_validation else "train"].append(text)
    return {split: "".join(parts) for split, parts in content.items() if parts}


def _find_files(path: str | Sequence[str], left_out: list[str]) -> list[Path]:
    files: list[Path] = []
    for entry in [Path(path)] if isinstance(path, str) else map(Path, path):
        if not entry.exists():
            raise FileNotFoundError(f"no such text file or folder: {entry} (looked in {Path.cwd()}): correct the path.")
        if not entry.is_dir():
            files.append(entry)
            continue
        listing = list_files(entry)
        tops = {name.partition("/")[0] for name in listing.files if not name.lower().endswith(_CODE_SUFFIXES)}
        if of_splits := names_of_splits(tops):
            raise ValueError(
                f"{entry} holds several splits ({', '.join(of_splits)}), which would be trained on as one text: set "
                "path, validation_path and test_path to the file or folder of each."
            )
        files += [entry / name for name in listing.files]
        left_out += [f"{entry}: {line}" for line in listing.left_out]
    if not files:
        raise FileNotFoundError(f"no files under {path}: use a text file or a folder with text files.")
    return files


def _read_huggingface(path: str, name: str | None, fractions: tuple[float, float]) -> tuple[dict[str, str], list[str]]:
    dataset = load_huggingface(path, name)
    texts, left_out = {}, []
    for split, part in dataset.items():
        if split not in SPLITS or not len(part):
            left_out.append(f"the split {split} ({len(part)} rows)")
            continue
        if "text" not in part.column_names:
            raise ValueError(
                f'{path} has the columns {part.column_names}, "text" is not among them: save a copy with a column of '
                "that name by save_to_disk, and use its folder as path."
            )
        rows = list(part["text"])
        if missing := [row for row, text in enumerate(rows) if text is None]:
            left_out.append(f"{len(missing)} row(s) of {split} without text, such as row {missing[0]}")
        for row, text in enumerate(rows):
            if not isinstance(text, str | None):
                raise ValueError(
                    f'{path}, {split}, row {row}: "text" must be a text, got {text!r:.60}: save a copy with a column '
                    '"text" of strings by save_to_disk, and use its folder as path.'
                )
        # Every row is a line or a document and gets a line end. WikiText's blank lines are empty rows.
        texts[split] = "".join(text if text.endswith("\n") else text + "\n" for text in rows if text is not None)
        if not texts[split]:
            raise ValueError(f'{path}: no row of {split} has a text: use a dataset with a column "text" of strings.')
    if left_out:
        rank_zero_warn(f"{path}: left out: {'; '.join(left_out)}.")
    return _cut_if_whole({split: texts[split] for split in SPLITS if split in texts}, *fractions), left_out
