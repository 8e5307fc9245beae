"""Sources of text: the standard library's own source code, local files, or a Hugging Face dataset."""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from revdeq_lightning.data.loading.base import SPLITS
from revdeq_lightning.data.loading.files import huggingface_key, list_files, load_huggingface

SOURCES = ("python", "files", "huggingface")
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class TextSource(NamedTuple):
    """Text in splits that do not overlap.

    Attributes:
        key: Identifies the content.
        read: Returns the text of each split that exists.
    """

    key: str
    read: Callable[[], dict[str, str]]


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
            huggingface_key(str(path), dataset_name),
            lambda: _cut_if_whole(_read_huggingface(str(path), dataset_name), *fractions),
        )
    if source == "python":
        texts = _read_python(*fractions)
    else:
        paths = {"train": path, "validation": validation_path, "test": test_path}
        texts = {s: "".join(map(_read_utf8, _find_files(p))) for s, p in paths.items() if p is not None}
        for split, text in texts.items():
            if not text:
                raise ValueError(f"the {split} text is empty ({paths[split]}): use a file with text.")
        texts = _cut_if_whole(texts, *fractions)
    digest = hashlib.sha256()
    for split, text in texts.items():
        digest.update(f"{split}:{len(text)}:".encode() + text.encode())
    return TextSource(digest.hexdigest(), lambda: texts)


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


def _find_files(path: str | Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for entry in [Path(path)] if isinstance(path, str) else map(Path, path):
        if not entry.exists():
            raise FileNotFoundError(f"no such text file or folder: {entry} (looked in {Path.cwd()}): correct the path.")
        files += [entry / name for name in list_files(entry)] if entry.is_dir() else [entry]
    if not files:
        raise FileNotFoundError(f"no files under {path}: use a text file or a folder with text files.")
    return files


def _read_utf8(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}: "
            f"convert it, for example with `iconv -f ISO-8859-1 -t UTF-8 {file.name}`."
        ) from None


def _read_huggingface(path: str, name: str | None) -> dict[str, str]:
    dataset = load_huggingface(path, name)
    texts = {}
    for split in SPLITS:
        if split in dataset:
            if "text" not in dataset[split].column_names:
                raise ValueError(f'{path} has the columns {dataset[split].column_names}, "text" is not among them.')
            # Every row is a line or a document and gets a line end. WikiText's blank lines are empty rows.
            texts[split] = "".join(row if row.endswith("\n") else row + "\n" for row in dataset[split]["text"])
    return texts
