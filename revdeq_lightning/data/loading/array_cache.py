"""Prepared data on disk: arrays in one safetensors file, read as memory maps."""

import json
import os
import secrets
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}


class StoredArray:
    """A memory map that is opened on first use and pickles as a path."""

    def __init__(self, path: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.offset, self.shape = path, dtype, offset, shape
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    @property
    def array(self) -> NDArray[Any]:
        """The read-only memory map."""
        if self._map is None:
            self._map = np.memmap(self.path, _DTYPES[self.dtype], "r", offset=self.offset, shape=self.shape)
        return self._map


class ArrayCache(NamedTuple):
    """Arrays by name, and the plain containers stored with them."""

    arrays: dict[str, StoredArray]
    metadata: dict[str, Any]

    def checksum(self, name: str) -> str:
        """CRC-32 of an array's content, verified when the file was opened."""
        return f"{self.metadata['checksums'][name]:08x}"


def load_or_build(path: Path, build: Callable[[], tuple[dict[str, NDArray[Any]], dict[str, Any]]]) -> ArrayCache:
    """Read the arrays from `path`, or build and store them there.

    One process builds while the others wait. The file is written atomically (to a temporary file, synced, renamed); a
    damaged file is reported and rebuilt.

    Args:
        path: Path of the file, whose name must identify the content.
        build: Returns the arrays (uint8, uint16, uint32, or int64) and JSON-serializable metadata.
    """
    if (cache := _read(path)) is None:
        with ExitStack() as stack:
            with _written_to(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(f"{path}.lock"))
            if (cache := _read(path, quiet=True)) is None:
                content = build()
                with _written_to(path.parent):
                    _write(path, *content)
                cache = _read(path)
    if cache is None:
        raise OSError(f"{path} cannot be read back after writing: check the disk, or set cache_dir to a different one.")
    return cache


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    """Name the setting in errors."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"cache_dir={folder} cannot be written to: {reason}; set data.cache_dir to another folder"
        ) from None


def _write(path: Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    checksums = {name: zlib.crc32(array.data) for name, array in arrays.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        save_file(arrays, temporary, metadata={"json": json.dumps(metadata | {"checksums": checksums})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors makes the file readable only by the owner
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
            name: StoredArray(path, entry["dtype"], 8 + header_bytes + entry["data_offsets"][0], tuple(entry["shape"]))
            for name, entry in header.items()
        }
        if all(zlib.crc32(arrays[n].array.data) == checksum for n, checksum in metadata["checksums"].items()):
            return ArrayCache(arrays, metadata)
    except (ValueError, KeyError, TypeError, OSError):
        pass
    if not quiet:
        warnings.warn(f"the stored data {path} is damaged and will be rebuilt.", stacklevel=3)
    return None
