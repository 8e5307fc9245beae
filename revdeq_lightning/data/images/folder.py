"""A folder with one subfolder per class, on disk or in a tar archive."""

import hashlib
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from revdeq_lightning.data.images.decoding import IMAGE_SUFFIXES
from revdeq_lightning.data.images.tables import AbstractImageReader, Content, ImageCollection, ImageSource, ImageTable

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class _NamedReader(AbstractImageReader):
    def __init__(self, root: Path, prefix: str, names: Sequence[str]) -> None:
        # One array, not a list: workers that are forked share it for good.
        self.root, self.prefix, self.names = root, prefix, np.array([os.fsencode(name) for name in names])

    def name(self, position: int) -> str:
        return os.fsdecode(self.names[position])


class FolderReader(_NamedReader):
    """Files below a folder."""

    def read(self, position: int) -> Content:
        """The file's bytes."""
        return (self.root / self.prefix / self.name(position)).read_bytes()


class ArchiveReader(_NamedReader):
    """Members of a tar archive; of a compressed one only all in a row."""

    def __init__(self, root: Path, prefix: str, names: Sequence[str], spans: NDArray[np.int64] | None) -> None:
        super().__init__(root, prefix, names)
        self.spans = spans  # offset and size of each member, if it is not compressed
        self.random_access = spans is not None

    def read(self, position: int) -> Content:
        """The member's bytes."""
        if self.spans is None:
            return next(content for _, content in self.stream([position]))
        offset, size = (int(value) for value in self.spans[position])
        with self.root.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def stream(self, positions: Sequence[int]) -> Iterator[tuple[int, Content]]:
        """In the order of the archive."""
        indices = {self.prefix + self.name(position): index for index, position in enumerate(positions)}
        for member, archive in _members(self.root):
            name = _normalized(member.name)
            if name in indices and (file := archive.extractfile(member)) is not None:
                yield indices[name], file.read()


def open_folder(path: Path) -> ImageSource:
    """Images of `path`: a folder or a tar archive of one, with `train/CLASS/*` and so on, or `CLASS/*` alone."""
    if path.is_dir():
        return ImageSource(partial(_folder_key, path), partial(_list_folder, path))
    if not path.exists():
        raise FileNotFoundError(
            f"no such image folder or archive: {path} (looked in {Path.cwd()}): give a folder with train/CLASS/* (and "
            f"val/CLASS/*, test/CLASS/*) or CLASS/*, or a tar archive of one."
        )
    if not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{path} is no folder and no archive ({', '.join(ARCHIVE_SUFFIXES)}).")
    return ImageSource(partial(_archive_key, path), partial(_list_archive, path))


def _folder_key(root: Path) -> str:
    digest = hashlib.sha256()
    for name in sorted(_walk(root)):
        digest.update(f"{name}:".encode("utf-8", "surrogateescape"))
        if not name.endswith("/"):
            digest.update(hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()


def _archive_key(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(root: Path) -> list[str]:
    """Relative names of the files, and of the folders with a slash at the end; hidden ones excepted."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        names += [f"{prefix}{name}/" for name in subfolders]
        names += [f"{prefix}{name}" for name in files if not name.startswith(".")]
    return names


def _list_folder(root: Path) -> ImageCollection:
    prefix, names = _without_wrapper(_walk(root))
    layout = _arrange(names, str(root))
    return _collect(FolderReader(root, prefix, layout.files), layout)


def _list_archive(path: Path) -> ImageCollection:
    members: dict[str, tuple[int, int]] = {}
    for member, _ in _members(path):
        name = _normalized(member.name)
        if not name or f"/{name}".count("/."):
            continue
        if member.isdir():
            members[f"{name}/"] = (0, 0)
        elif member.isreg():
            members[name] = (member.offset_data, member.size)
        else:
            raise ValueError(f"{name} in {path} is a link or a device: archive the files themselves.")
    prefix, names = _without_wrapper(list(members))
    layout = _arrange(names, str(path))
    spans = np.array([members[prefix + name] for name in layout.files], np.int64) if _is_plain_tar(path) else None
    return _collect(ArchiveReader(path, prefix, layout.files, spans), layout)


def _normalized(name: str) -> str:
    return name.removeprefix("./").strip("/") if name != "." else ""


def _is_plain_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                yield member, archive
            # tarfile takes a header that is cut off for the end.
            stream: Any = archive.fileobj
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("it ends before its end mark")
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a tar archive ({error}): check that it is whole.") from None


def _without_wrapper(names: list[str]) -> tuple[str, list[str]]:
    """The names without a folder that holds all the rest, and that folder."""
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


class _Layout(NamedTuple):
    files: list[str]  # all images, in order
    class_names: list[str]
    splits: dict[str, dict[str, str]]  # the class of each image


def _arrange(names: list[str], where: str) -> _Layout:
    tops = {name.partition("/")[0] for name in names if "/" in name}
    folders = {f"{top}/": _SPLIT_FOLDERS[top] for top in sorted(tops & set(_SPLIT_FOLDERS))} or {"": "train"}
    if "train" not in folders.values():
        raise ValueError(f"{where} has {', '.join(folders)} but no train/: put the training images into train/CLASS/.")
    if {"val/", "validation/"} <= set(folders):
        raise ValueError(f"{where} has both val/ and validation/: leave one of them.")
    splits: dict[str, dict[str, str]] = {}
    for folder, split in folders.items():
        inside = [name for name in names if name.startswith(folder) and "/" in name[len(folder) :]]
        class_of = {name: name[len(folder) :].partition("/")[0] for name in inside}
        splits[split] = {name: class_of[name] for name in sorted(inside) if _is_image(name)}
        if empty := sorted(set(class_of.values()) - set(splits[split].values())):
            raise ValueError(
                f"the class folder {folder}{empty[0]} in {where} has no images ({', '.join(IMAGE_SUFFIXES)}): "
                "fill it or remove it."
            )
    class_names = sorted(set(splits["train"].values()))
    if len(class_names) < 2:
        raise ValueError(
            f"{where} has {len(class_names)} class(es) {class_names}, a classifier needs two: give a folder with "
            "train/CLASS/* (and val/CLASS/*, test/CLASS/*) or CLASS/*."
        )
    for split, class_of in splits.items():
        if unknown := sorted(set(class_of.values()) - set(class_names)):
            raise ValueError(f"{where} has the class {unknown[0]} in {split} but not in train: add it there.")
        if not class_of:
            raise ValueError(f"{where} has a folder for {split} without class folders: fill it or remove it.")
    files = sorted(name for class_of in splits.values() for name in class_of)
    if ignored := sorted({name for name in names if not name.endswith("/")} - set(files)):
        listed = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        rank_zero_warn(f"{len(ignored)} file(s) in {where} are no images of a class and not used: {listed}.")
    return _Layout(files, class_names, splits)


def _collect(reader: AbstractImageReader, layout: _Layout) -> ImageCollection:
    position = {name: index for index, name in enumerate(layout.files)}
    label = {name: index for index, name in enumerate(layout.class_names)}
    tables = {
        split: ImageTable(
            reader, np.array([position[name] for name in class_of]), np.array([label[c] for c in class_of.values()])
        )
        for split, class_of in layout.splits.items()
    }
    return ImageCollection(layout.class_names, tables)
