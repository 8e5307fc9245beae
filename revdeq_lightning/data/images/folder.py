"""A folder with one subfolder per class, on disk or in a tar archive."""

import io
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from revdeq_lightning.data.images.decoding import IMAGE_SUFFIXES
from revdeq_lightning.data.images.tables import Content, ImageCollection, ImageSource, ImageTable
from revdeq_lightning.data.loading.files import content_key, list_files

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def open_folder(path: Path) -> ImageSource:
    """Images of `path`, a folder or its tar archive, with `train/CLASS/*` and so on, or only `CLASS/*`."""
    if path.is_dir():
        return ImageSource(lambda: content_key(path, list_files(path)), partial(_list_folder, path))
    if not path.exists():
        raise FileNotFoundError(
            f"no such image folder or archive: {path} (looked in {Path.cwd()}): use a folder with train/CLASS/* (and "
            f"val/CLASS/*, test/CLASS/*) or CLASS/*, or a tar archive of one."
        )
    if not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)}).")
    return ImageSource(lambda: content_key(path.parent, [path.name]), partial(_list_archive, path))


def _list_folder(root: Path) -> ImageCollection:
    folders = [f"{Path(folder).relative_to(root).as_posix()}/" for folder, _, _ in os.walk(root, followlinks=True)]
    visible = [name for name in folders if not name.startswith(".") and "/." not in name]
    prefix, names = _without_wrapper([*visible, *list_files(root)])
    return _arrange(names, str(root), os.fsencode, _FileReader(root / prefix))


@dataclass
class _FileReader:
    root: Path

    def __call__(self, name: bytes) -> Content:
        return (self.root / os.fsdecode(name)).read_bytes()


@dataclass
class _MemberReader:
    """Read members of an uncompressed tar archive; `temporary` is the file if it was decompressed for this reader."""

    path: Path
    temporary: Any

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
    for entry in entries:
        name = "" if entry.name == "." else entry.name.removeprefix("./").strip("/")
        if not name or f"/{name}".count("/."):
            continue
        if not (entry.isdir() or entry.isreg()):
            raise ValueError(f"{name} in {path} is a link or a device: archive the files themselves.")
        members[f"{name}/" if entry.isdir() else name] = (entry.offset_data, entry.size)
    prefix, names = _without_wrapper(list(members))
    return _arrange(names, str(path), lambda name: members[prefix + name], reader)


def _decompressed(path: Path) -> _MemberReader:
    with tarfile.open(path) as archive:
        stream: Any = archive.fileobj
        if isinstance(stream, io.BufferedReader):
            return _MemberReader(path, None)
        temporary = tempfile.NamedTemporaryFile(suffix=".tar")  # noqa: SIM115 (open as long as the reader)
        stream.seek(0)
        shutil.copyfileobj(stream, temporary)
        temporary.flush()
        return _MemberReader(Path(temporary.name), temporary)


def _without_wrapper(names: list[str]) -> tuple[str, list[str]]:
    """Names without a common top-level folder, and that folder."""
    prefix = ""
    while len(tops := {name.partition("/")[0] for name in names}) == 1:
        top = tops.pop() + "/"
        inner = [name.removeprefix(top) for name in names if name != top]
        images = [name for name in inner if _is_image(name)]
        if top[:-1] in _SPLIT_FOLDERS or not images or not all("/" in name for name in images):
            break
        prefix, names = prefix + top, inner
    return prefix, names


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _arrange(
    names: list[str], where: str, place: Callable[[str], Any], read: Callable[[Any], Content]
) -> ImageCollection:
    """Find splits and classes; `place` returns the location of an image for `read`."""
    tops = {name.partition("/")[0] for name in names if "/" in name}
    folders = {f"{top}/": _SPLIT_FOLDERS[top] for top in sorted(tops & set(_SPLIT_FOLDERS))} or {"": "train"}
    if "train" not in folders.values():
        raise ValueError(f"{where} has {', '.join(folders)} but no train/: put the training images into train/CLASS/.")
    if {"val/", "validation/"} <= set(folders):
        raise ValueError(f"{where} has both val/ and validation/: remove one of them.")
    splits: dict[str, dict[str, str]] = {}  # the class of each image
    for folder, split in folders.items():
        inside = sorted(name for name in names if name.startswith(folder) and "/" in name[len(folder) :])
        class_of = {name: name[len(folder) :].partition("/")[0] for name in inside}
        splits[split] = {name: label for name, label in class_of.items() if _is_image(name)}
        if empty := sorted(set(class_of.values()) - set(splits[split].values())):
            raise ValueError(
                f"the class folder {folder}{empty[0]} in {where} has no images ({', '.join(IMAGE_SUFFIXES)}): "
                "fill it or remove it."
            )
    class_names = sorted(set(splits["train"].values()))
    if len(class_names) < 2:
        raise ValueError(
            f"{where} has {len(class_names)} class(es) {class_names}, a classifier needs two: use a folder with "
            "train/CLASS/* (and val/CLASS/*, test/CLASS/*) or CLASS/*."
        )
    for split, class_of in splits.items():
        if unknown := sorted(set(class_of.values()) - set(class_names)):
            raise ValueError(f"{where} has the class {unknown[0]} in {split} but not in train: add it there.")
        if not class_of:
            raise ValueError(f"{where} has a folder for {split} without class folders: fill it or remove it.")
    if ignored := sorted({name for name in names if not name.endswith("/")}.difference(*splits.values())):
        listed = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        rank_zero_warn(f"{len(ignored)} file(s) in {where} are not images of a class and are ignored: {listed}.")
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
    return ImageCollection(class_names, tables)
