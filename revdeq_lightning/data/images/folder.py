"""A folder with one subfolder per class, on disk or in a tar archive."""

import io
import lzma
import os
import shutil
import tarfile
import tempfile
import unicodedata
import weakref
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from revdeq_lightning.data.images.batches import Content, ImageCollection, ImageSource, ImageTable
from revdeq_lightning.data.images.decoding import IMAGE_SUFFIXES
from revdeq_lightning.data.loading.files import (
    content_key,
    count_names,
    list_files,
    made_by_system,
    split_of,
    splits_within,
    text_of,
)

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


def open_folder(path: Path) -> ImageSource:
    """Images of `path`, a folder or its tar archive, with `train/CLASS/*` and so on, or only `CLASS/*`.

    Splits may have any usual name, in any case; classes are the same if their names differ only in Unicode
    normalization. What the system made (hidden files, `Thumbs.db`, `@eaDir`, `__MACOSX`, ...) does not count.
    """
    if path.is_dir():
        return ImageSource(partial(_folder_key, path), partial(_list_folder, path))
    if not path.exists():
        raise FileNotFoundError(
            f"no such image folder or archive: {path} (looked in {Path.cwd()}): use a folder with train/CLASS/* (and "
            f"val/CLASS/*, test/CLASS/*) or CLASS/*, or a tar archive of one."
        )
    if not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)}).")
    return ImageSource(lambda: content_key(path.parent, [path.name]), partial(_list_archive, path))


def _folder_key(root: Path) -> str:
    files, _, left_out = list_files(root)
    return "; ".join([content_key(root, files), *left_out])


def _list_folder(root: Path) -> ImageCollection:
    files, folders, left_out = list_files(root)
    prefix, names = _without_wrapper([*(f"{name}/" for name in folders), *files])
    return _arrange(names, str(root), os.fsencode, partial(_read_file, root / prefix), left_out)


def _read_file(root: Path, name: bytes) -> Content:
    return (root / os.fsdecode(name)).read_bytes()


@dataclass
class _MemberReader:
    """Read members of an uncompressed tar archive, which may have been decompressed for this reader."""

    path: Path
    temporary: bool

    def __call__(self, span: NDArray[np.int64]) -> Content:
        offset, size = span.tolist()
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _list_archive(path: Path) -> ImageCollection:
    try:
        reader = _decompressed(path)
        with tarfile.open(reader.path, "r:") as archive:
            entries = archive.getmembers()
            # tarfile mistakes a truncated header for the end.
            stream: Any = archive.fileobj
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("it ends before its end marker")
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a tar archive ({error}): check that it is complete.") from None
    members: dict[str, tuple[int, int]] = {}
    system = []
    for entry in entries:
        name = "" if entry.name == "." else entry.name.removeprefix("./").strip("/")
        if not name or made_by_system(name):
            system += [name] * bool(name)
            continue
        if not (entry.isdir() or entry.isreg()):
            raise ValueError(f"{name} in {path} is a link or a device: archive the files themselves.")
        members[f"{name}/" if entry.isdir() else name] = (entry.offset_data, entry.size)
    prefix, names = _without_wrapper(list(members))
    left_out = [count_names("made by the system", system)] if system else []
    return _arrange(names, str(path), lambda name: members[prefix + name], reader, left_out)


def _decompressed(path: Path) -> _MemberReader:
    with tarfile.open(path) as archive:
        stream: Any = archive.fileobj
        if isinstance(stream, io.BufferedReader):
            return _MemberReader(path, temporary=False)
        temporary = tempfile.NamedTemporaryFile(suffix=".tar")  # noqa: SIM115 (open as long as the reader)
        reader = _MemberReader(Path(temporary.name), temporary=True)
        weakref.finalize(reader, temporary.close)
        stream.seek(0)
        shutil.copyfileobj(stream, temporary)
        temporary.flush()
        return reader


def _without_wrapper(names: list[str]) -> tuple[str, list[str]]:
    """Names without a common top-level folder, and that folder."""
    prefix = ""
    while len(tops := {name.partition("/")[0] for name in names}) == 1:
        top = tops.pop() + "/"
        inner = [name.removeprefix(top) for name in names if name != top]
        is_split = top == "train/" or split_of(top[:-1]) in ("validation", "test")
        images = [name for name in inner if _is_image(name)]
        if is_split or not images or not all("/" in name for name in images):
            break
        prefix, names = prefix + top, inner
    return prefix, names


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _split_folders(names: list[str], where: str) -> dict[str, str]:
    """The split of each top-level folder; without splits, everything is for training."""
    below: dict[str, set[str]] = {}  # where each top-level folder has images: the names of its folders, "" for itself
    for top, _, inner in (name.partition("/") for name in names if "/" in name):
        below.setdefault(top, set())
        if _is_image(inner):
            below[top].add(inner.partition("/")[0] if "/" in inner else "")
    folders = {f"{top}/": split for top in sorted(below) if (split := split_of(top))}
    others = sorted(top for top, inner in below.items() if inner and f"{top}/" not in folders)
    if not folders:
        _refuse_unclear_splits({top: below[top] for top in others}, where)
        return {"": "train"}
    if "train" not in folders.values():
        raise ValueError(f"{where} has {_shown(folders)} but no train/: put the training images into train/CLASS/.")
    if others:
        raise ValueError(
            f"{where} has folders of splits ({_shown(folders)}) and other folders with images ({_shown(others)}): "
            "remove or rename those, or, if all are classes, move all into one folder train/."
        )
    for split in folders.values():
        same = [text_of(folder) for folder, other in folders.items() if other == split]
        if len(same) > 1:
            raise ValueError(f"{where} has both {' and '.join(same)} for {split}: remove or rename one of them.")
    return folders


def _refuse_unclear_splits(below: dict[str, set[str]], where: str) -> None:
    """Raise ValueError if folders whose names stand for no split, with the folders in each, may be splits anyway."""
    if within := [top for top, inner in below.items() if len({*map(split_of, inner)} - {None}) > 1]:
        raise ValueError(
            f"{where} has splits within its classes ({_shown(within)}): move them to train/CLASS, val/CLASS."
        )
    alike = {top: splits for top in below if (splits := splits_within(top))}
    may_be_classes = any("" in below[top] for top in alike)
    all_alike = len(alike) == len(below) and len(set().union(*alike.values())) > 1
    if len(alike) > 1 and (all_alike or not may_be_classes):
        raise ValueError(
            f"{where} has folders that look like splits, not like classes ({_shown(alike)}): rename them to train, val "
            "and test, with one folder per class in each."
        )
    inner = [sorted(folders) for folders in below.values()]
    if len(inner) > 1 and len(inner[0]) > 1 and all(folders == inner[0] for folders in inner):
        raise ValueError(
            f"{where} has folders with the same folders in each ({_shown(inner[0])} in {_shown(below)}): rename the "
            "outer ones to train, val and test if they are no classes; if they are, move them into one folder train/."
        )


def _shown(names: Iterable[str]) -> str:
    return ", ".join(map(text_of, islice(names, 5)))


def _class_of_folder(splits: dict[str, dict[str, str]], where: str) -> dict[str, str]:
    """The class that each class folder stands for: folders that differ only in Unicode normalization are one class."""
    spellings: dict[str, list[str]] = {}
    for split in sorted(splits, key=lambda split: split != "train"):
        for folder in sorted(set(splits[split].values())):
            spellings.setdefault(unicodedata.normalize("NFC", folder), []).append(folder)
    alike: dict[str, str] = {}
    for name in spellings:
        other = alike.setdefault(" ".join(name.casefold().split()), name)
        if other != name and len(name) > 1:  # single letters are classes of characters
            both = f"{text_of(other)!r} and {text_of(name)!r}"
            raise ValueError(
                f"{where} has the class folders {both}, which differ only in case or spaces: give one name."
            )
    return {folder: found[0] for found in spellings.values() for folder in found}


def _arrange(
    names: list[str], where: str, place: Callable[[str], Any], read: Callable[[Any], Content], left_out: list[str]
) -> ImageCollection:
    """Find splits and classes; `place` returns the location of an image for `read`."""
    splits: dict[str, dict[str, str]] = {}  # the class folder of each image
    for folder, split in _split_folders(names, where).items():
        inside = sorted(name for name in names if name.startswith(folder) and "/" in name[len(folder) :])
        class_of = {name: name[len(folder) :].partition("/")[0] for name in inside}
        splits[split] = {name: label for name, label in class_of.items() if _is_image(name)}
        if empty := sorted(set(class_of.values()) - set(splits[split].values())):
            found, suffixes = text_of(folder + empty[0]), ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"the class folder {found} in {where} has no images ({suffixes}): fill it or remove it.")
    class_of_folder = _class_of_folder(splits, where)
    splits = {s: {name: class_of_folder[folder] for name, folder in found.items()} for s, found in splits.items()}
    class_names = sorted(set(splits["train"].values()))
    if len(class_names) < 2:
        raise ValueError(
            f"{where} has {len(class_names)} class(es) {class_names}, a classifier needs two: use a folder with "
            "train/CLASS/* (and val/CLASS/*, test/CLASS/*) or CLASS/*."
        )
    for split, class_of in splits.items():
        if unknown := sorted(set(class_of.values()) - set(class_names)):
            raise ValueError(f"{where} has the class {text_of(unknown[0])} in {split} but not in train: add it there.")
        if not class_of:
            raise ValueError(f"{where} has a folder for {split} without class folders: fill it or remove it.")
    if ignored := {name for name in names if not name.endswith("/")}.difference(*splits.values()):
        left_out = [*left_out, count_names("file(s) are not images of a class and are ignored", ignored)]
        rank_zero_warn(left_out[-1])
    label = {name: index for index, name in enumerate(class_names)}
    tables = {
        split: ImageTable(
            np.array([os.fsencode(name) for name in class_of]),
            np.array([label[name] for name in class_of.values()]),
            np.array([place(name) for name in class_of]),
            read,
        )
        for split, class_of in splits.items()
    }
    return ImageCollection([text_of(name) for name in class_names], tables, left_out)
