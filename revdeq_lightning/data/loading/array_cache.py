"""Prepared data on disk: arrays in one safetensors file, read as memory maps."""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}


class StoredArray:
    """A memory map that pickles as a path."""

    def __init__(self, path: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.offset, self.shape = path, dtype, offset, shape
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    def open(self) -> NDArray[Any]:
        """The read-only memory map, which stays valid when the file is deleted later."""
        if self._map is None:
            self._map = np.memmap(self.path, _DTYPES[self.dtype], "r", offset=self.offset, shape=self.shape)
        return self._map

    @property
    def array(self) -> NDArray[Any]:
        """The read-only memory map."""
        return self.open()


class ArrayCache(NamedTuple):
    """Arrays by name, and the plain containers stored with them."""

    arrays: dict[str, StoredArray]
    metadata: dict[str, Any]

    def checksum(self, name: str) -> str:
        """CRC-32 of an array's content, verified when the file was opened."""
        return f"{self.metadata['checksums'][name]:08x}"


class ArrayWriter:
    """Collects arrays on disk, in parts, for `load_or_build`.

    Attributes:
        folder: Folder for temporary files, which is deleted afterwards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, dict[str, Any]] = {}
        self._checksums: dict[str, int] = {}

    def append(self, name: str, part: NDArray[Any]) -> None:
        """Append rows to an array; the arrays follow one another."""
        part = np.ascontiguousarray(part)
        dtype = next(key for key, known in _DTYPES.items() if known == part.dtype)
        with written_to(self.folder.parent), (self.folder / "arrays").open("ab") as file:
            entry: dict[str, Any] = {"dtype": dtype, "shape": [0, *part.shape[1:]], "data_offsets": [file.tell(), 0]}
            entry = self._entries.setdefault(name, entry)
            file.write(part.data)
            entry["shape"][0] += len(part)
            entry["data_offsets"][1] = file.tell()
        self._checksums[name] = zlib.crc32(part.data, self._checksums.get(name, 0))

    def finish(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write the file atomically: to a temporary one, synced, renamed."""
        text = json.dumps(metadata | {"checksums": self._checksums})
        header = json.dumps({"__metadata__": {"json": text}} | self._entries).encode()
        header += b" " * (-len(header) % 8)  # aligns the arrays
        with written_to(self.folder.parent):
            with (self.folder / "whole").open("wb") as whole, (self.folder / "arrays").open("rb") as arrays:
                whole.write(len(header).to_bytes(8, "little") + header)
                shutil.copyfileobj(arrays, whole)
                whole.flush()
                os.fsync(whole.fileno())
            os.replace(self.folder / "whole", path)


def load_or_build(path: Path, build: Callable[[ArrayWriter], dict[str, Any]]) -> ArrayCache:
    """Read the arrays from `path`, or build and store them there.

    One process builds while the others wait. The file appears complete or not at all; a damaged file is reported and
    rebuilt, and what an interrupted process left is deleted.

    Args:
        path: Path of the file, whose name must identify the content.
        build: Appends the arrays (uint8, uint16, uint32, or int64) and returns JSON-serializable metadata.
    """
    if (cache := _read(path)) is None:
        with ExitStack() as stack:
            with written_to(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(f"{path}.lock"))
            if (cache := _read(path, quiet=True)) is None:
                for left in path.parent.glob(f".{path.name}.*"):
                    shutil.rmtree(left, ignore_errors=True)
                with written_to(path.parent):
                    folder = stack.enter_context(TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent))
                writer = ArrayWriter(Path(folder))
                writer.finish(path, build(writer))
                cache = _read(path)
    if cache is None:
        raise OSError(f"{path} cannot be read back after writing: check the disk, or set cache_dir to a different one.")
    return cache


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Name the setting in errors of writing."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cache_dir={folder} cannot be written to: {error.strerror or error}; set data.cache_dir to another folder"
        ) from None


def _read(path: Path, quiet: bool = False) -> ArrayCache | None:
    """The stored arrays, or None if they are missing or damaged."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, path.stat().st_size)))
            metadata = json.loads(header.pop("__metadata__")["json"])
            arrays = {
                name: StoredArray(path, entry["dtype"], 8 + header_bytes + entry["data_offsets"][0], (*entry["shape"],))
                for name, entry in header.items()
            }
            sizes = {name: np.diff(entry["data_offsets"]).item() for name, entry in header.items()}
            if all(
                _checksum(file, arrays[name].offset, sizes[name]) == checksum
                for name, checksum in metadata["checksums"].items()
            ):
                for array in filter(len, arrays.values()):
                    array.open()
                return ArrayCache(arrays, metadata)
    except (ValueError, KeyError, TypeError, OSError):
        pass
    if not quiet:
        warnings.warn(f"the stored data {path} is damaged and will be rebuilt.", stacklevel=3)
    return None


def _checksum(file: BinaryIO, offset: int, size: int) -> int:
    """CRC-32 of a part of a file, read in blocks: the pages of a map would count as memory of the process."""
    file.seek(offset)
    checksum = 0
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        checksum, size = zlib.crc32(block, checksum), size - len(block)
    return checksum
