"""Prepared data on disk: a folder of arrays, read as memory maps."""

import errno
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

_INDEX = "index.json"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoredArray:
    """A read-only memory map, which pickles as a path and stays valid when the file is deleted later."""

    def __init__(self, path: Path, dtype: str, shape: list[int]) -> None:
        self.path, self.dtype, self.shape = path, dtype, tuple(shape)
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    def open(self) -> None:
        """Map the file, so that it may be deleted from now on."""
        if self._map is None:
            self._map = np.memmap(self.path, self.dtype, "r", shape=self.shape)

    @property
    def array(self) -> NDArray[Any]:
        self.open()
        return cast(NDArray[Any], self._map)


class ArrayCache(NamedTuple):
    """Arrays by name, their CRC-32, verified when they were opened, and the plain containers stored with them."""

    arrays: dict[str, StoredArray]
    checksums: dict[str, str]
    metadata: dict[str, Any]


class ArrayWriter:
    """Writes arrays in parts for `load_or_build`; `folder` is for temporary files, which are deleted afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stored = folder, folder / "stored"
        self.stored.mkdir()
        self._arrays: dict[str, tuple[str, list[int]]] = {}
        self._checksums: dict[str, str] = {}

    def append(self, name: str, part: NDArray[Any]) -> None:
        part = np.ascontiguousarray(part)
        with (self.stored / name).open("ab") as file:
            file.write(part.data)
        _, shape = self._arrays.setdefault(name, (part.dtype.str, [0, *part.shape[1:]]))
        shape[0] += len(part)
        self._checksums[name] = f"{zlib.crc32(part.data, int(self._checksums.get(name, '0'), 16)):08x}"

    def finish(self, path: Path, metadata: dict[str, Any]) -> None:
        """Move what was written to `path`, all at once."""
        index = {"arrays": self._arrays, "checksums": self._checksums, "metadata": metadata}
        (self.stored / _INDEX).write_text(json.dumps(index))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(self.stored, path)


def load_or_build(path: Path, build: Callable[[ArrayWriter], dict[str, Any]]) -> ArrayCache:
    """Read the arrays from the folder `path`, whose name must identify the content, or build and store them there.

    `build` appends them and returns JSON-serializable metadata. One process builds while the others wait. The arrays
    appear complete or not at all; damaged ones are reported and rebuilt, and what an interrupted process left is
    deleted. If the folder cannot be written, the error names the setting `cache_dir`.
    """
    if (cache := _read(path)) is None:
        writer = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if (cache := _read(path, quiet=True)) is None:
                    _delete_left(path)
                    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
                        writer = ArrayWriter(Path(folder))
                        writer.finish(path, build(writer))
                    cache = _read(path)
        except OSError as error:
            is_inside = str(error.filename).startswith(f"{path.parent}{os.sep}")
            if writer is not None and error.errno not in _NO_SPACE and not is_inside:
                raise  # of what `build` reads
            raise OSError(
                f"cache_dir={path.parent} cannot be written to: {error.strerror or error}; set data.cache_dir to "
                "another folder"
            ) from None
    if cache is None:
        raise OSError(f"{path} cannot be read back after writing: check the disk, or set cache_dir to a different one.")
    return cache


def _delete_left(path: Path) -> None:
    """Delete what killed processes left, also of other data, unless a process is building it."""
    for left in path.parent.glob(".*.arrays.*"):
        other = path.with_name(left.stem[1:])
        lock = nullcontext() if other == path else FileLock(f"{other}.lock", timeout=0)
        with suppress(OSError), lock:  # also of a lock that another process or user holds
            shutil.rmtree(left, ignore_errors=True)


def _read(path: Path, quiet: bool = False) -> ArrayCache | None:
    """The stored arrays, or None if they are missing or damaged."""
    if not path.is_dir():
        return None
    try:
        index = json.loads((path / _INDEX).read_text())
        arrays = {name: StoredArray(path / name, *index["arrays"][name]) for name in index["arrays"]}
        if all(_checksum(path / name) == checksum for name, checksum in index["checksums"].items()):
            for array in filter(len, arrays.values()):
                array.open()
            return ArrayCache(arrays, index["checksums"], index["metadata"])
    except (ValueError, KeyError, TypeError, OSError):
        pass
    if not quiet:
        warnings.warn(f"the stored data {path} is damaged and will be rebuilt.", stacklevel=3)
    return None


def _checksum(path: Path) -> str:
    """CRC-32 of a file, read in blocks: the pages of a map would count as memory of the process."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"
