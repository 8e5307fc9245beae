"""Tokens on disk: one safetensors file for all splits, read as memory maps."""

import json
import os
import secrets
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

_DTYPES = {"U16": np.uint16, "U32": np.uint32}


class TokenArray:
    """Tokens of one split: a memory map that is opened at first use, so that it pickles as a path."""

    def __init__(self, path: Path, dtype: str, offset: int, length: int) -> None:
        self.path, self.dtype, self.offset, self.length = path, dtype, offset, length
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    @property
    def array(self) -> NDArray[Any]:
        """The read-only memory map."""
        if self._map is None:
            self._map = np.memmap(self.path, _DTYPES[self.dtype], "r", offset=self.offset, shape=(self.length,))
        return self._map


class TokenCache(NamedTuple):
    """Tokens of each split, and what was stored with them (plain containers)."""

    splits: dict[str, TokenArray]
    metadata: dict[str, Any]


def load_or_build(path: Path, build: Callable[[], tuple[dict[str, NDArray[Any]], dict[str, Any]]]) -> TokenCache:
    """Read the tokens from `path`, or build and store them there.

    Of several processes one builds while the others wait. The file appears whole or not at all (written beside, synced,
    renamed); a damaged one is reported and built anew.

    Args:
        path: The file. Its name must identify the content.
        build: Gives the tokens of each split (uint16 or uint32) and metadata that JSON can hold.
    """
    if (cache := _read(path)) is not None:
        return cache
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if (cache := _read(path, quiet=True)) is None:
            _write(path, *build())
            cache = _read(path)
    if cache is None:
        raise OSError(f"{path} cannot be read back after writing: check the disk, or set cache_dir to another one.")
    return cache


def _write(path: Path, splits: dict[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    checksums = {split: zlib.crc32(tokens.data) for split, tokens in splits.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        save_file(splits, temporary, metadata={"json": json.dumps(metadata | {"checksums": checksums})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors lets only the owner read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, quiet: bool = False) -> TokenCache | None:
    """The stored tokens, or None if there are none or they are damaged."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, path.stat().st_size)))
        metadata = json.loads(header.pop("__metadata__")["json"])
        splits = {
            split: TokenArray(path, entry["dtype"], 8 + header_bytes + entry["data_offsets"][0], entry["shape"][0])
            for split, entry in header.items()
        }
        intact = all(zlib.crc32(splits[s].array.data) == checksum for s, checksum in metadata["checksums"].items())
    except (ValueError, KeyError, TypeError, OSError):
        intact = False
    if not intact:
        if not quiet:
            warnings.warn(f"the stored tokens {path} are damaged: they are built anew.", stacklevel=3)
        return None
    return TokenCache(splits, metadata)
