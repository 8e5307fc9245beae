"""Checkpoints that are folders, one file a process (torch.distributed.checkpoint), read without running their code.

PyTorch's own reader unpickles whatever the folder holds. Here the metadata is parsed into records of ours, from which
PyTorch's are made anew, and every other value is loaded with `weights_only=True`. No Lightning in here.
"""

import io
import pickle
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from revdeq_lightning.checkpoints.files import SHARDED_PARTS, read_checkpoint, reason_of
from revdeq_lightning.errors import CheckpointError

METADATA, REST = SHARDED_PARTS
"""PyTorch's description of the tensors; what Lightning stores beside them."""
WEIGHTS, TRAINED = "state_dict", "trained_weights"

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_RECORDS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            *("BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
}
"""All that PyTorch names in metadata, beside dtypes."""


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether this is a folder that a sharded checkpoint was written to."""
    return all((Path(path) / name).is_file() for name in (METADATA, REST))


def load_into(state: dict[str, Any], path: Path, *, no_dist: bool = False) -> None:
    """Fill the tensors of a nested state from the folder, each process its parts, and replace its other values.

    Raises:
        CheckpointError: If the folder lacks one of them, holds it in another shape, is damaged, or holds code.
    """
    metadata = read_metadata(path)
    held = metadata.state_dict_metadata
    for name, value in flatten_state_dict(state)[0].items():
        entry = held.get(name)
        shape = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if entry is None or (isinstance(value, torch.Tensor) and shape != tuple(value.shape)):
            wanted = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
            found = f"holds {shape}" if entry is not None else "has none"
            raise CheckpointError(f"the checkpoint does not fit the model: it needs {name}{wanted}, {path} {found}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked
            load(state, storage_reader=_Reader(path, metadata), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # no Exception: it would end the process in the midst of the others
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{path} {reason_of(reason)}, as process {rank} found") from None


def refuse_others(weights: Collection[str], path: Path) -> None:
    """Raise if the folder has weights beside these, which are not in the model.

    Raises:
        CheckpointError: If so; names the first.
    """
    prefix = f"{WEIGHTS}."
    names = [key.removeprefix(prefix) for key in read_metadata(path).state_dict_metadata if key.startswith(prefix)]
    for name in names:
        if name not in weights and not name.startswith(f"{TRAINED}."):
            raise CheckpointError(f"the checkpoint does not fit the model, which has no {prefix}{name}: {path}")


def read_whole(path: Path, *names: str) -> dict[str, Any]:
    """The named states (`state_dict`, `optimizer_0`, ...) in whole tensors, in this process alone.

    Raises:
        CheckpointError: If the folder is damaged, or holds code.
    """
    state: dict[str, Any] = {}
    for key, entry in read_metadata(path).state_dict_metadata.items():
        if key.split(".")[0] in names and isinstance(entry, TensorStorageMetadata):
            state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load_into(state, path, no_dist=True)
    found: dict[str, Any] = {name: {} for name in names}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        found[name][rest] = value
    return found


def read_rest(path: Path) -> dict[str, Any]:
    """What Lightning stores beside the tensors: settings, position, callbacks; errors as of `read_checkpoint`."""
    return read_checkpoint(path / REST)


def read_metadata(path: Path) -> Metadata:
    """Which tensors there are, and where.

    Raises:
        CheckpointError: If this is something else.
    """
    file = path / METADATA
    try:
        return _metadata(_MetadataUnpickler(io.BytesIO(file.read_bytes())).load())
    except Exception as error:  # a pickle that was made up ends in any of them
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file} is not the metadata of a checkpoint ({type(error).__name__}: {reason})"
        ) from None


def disk_error(error: BaseException) -> OSError | None:
    """The error of the disk, on whichever process, that kept a sharded checkpoint from being written; else None."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, CheckpointException):
        return next(filter(None, (disk_error(cause) for cause, _ in error.failures.values())), None)
    # PyTorch's archive writer replaces the error of the file below it.
    writes = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "unexpected pos" in str(error))
    return OSError(f"the file could not be written, is the disk full? ({error})".splitlines()[0]) if writes else None


class _Record:
    """In the place of an object of PyTorch's: what the pickle says of it. No code runs, and none can be replaced."""

    def __new__(cls, *args: Any) -> "_Record":
        record = object.__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    args: tuple[Any, ...]
    state: Any = None


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but records, dtypes, and Python's own containers, numbers and strings."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return type(name, (_Record,), {})  # of this pickle alone, whatever it does with it
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


def _state(record: Any, *kinds: str) -> Any:
    if not isinstance(record, _Record) or type(record).__name__ not in kinds:
        raise pickle.UnpicklingError(f"it holds a {type(record).__name__} in the place of a {' or '.join(kinds)}")
    return record.state


def _metadata(record: Any) -> Metadata:
    held = _state(record, "Metadata")
    entries = {name: _entry(entry) for name, entry in held["state_dict_metadata"].items()}
    places = {_index(index): _place(place) for index, place in held["storage_data"].items()}
    return Metadata(entries, storage_data=places)


def _entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    held = _state(record, "TensorStorageMetadata", "BytesStorageMetadata")
    if type(record).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    dtype, *_ = _state(held["properties"], "TensorProperties")
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError(f"it holds a {type(dtype).__name__} in the place of a dtype")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in held["chunks"]]
    parts = [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
    return TensorStorageMetadata(TensorProperties(dtype), _size(held["size"]), parts)


def _index(record: Any) -> MetadataIndex:
    held = _state(record, "MetadataIndex")
    offset = held.get("offset")
    return MetadataIndex(held["fqn"], None if offset is None else _size(offset), held.get("index"))


def _place(record: Any) -> _StorageInfo:
    held = _state(record, "_StorageInfo")
    file, offset, length = held["relative_path"], int(held["offset"]), int(held["length"])
    if Path(file).name != file or held.get("transform_descriptors"):
        raise pickle.UnpicklingError(f"it places a tensor in {file!r}, which is no plain file of the folder")
    return _StorageInfo(file, offset, length)


def _size(record: Any) -> torch.Size:
    _state(record, "Size")
    return torch.Size(*record.args)


class _Reader(FileSystemReader):
    """PyTorch's reader of the tensors alone: it is given the metadata, and looks for none by itself."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if args or kwargs.get("rank") is not None:
            raise CheckpointError(f"{self.path}: metadata of one process alone is not read")
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata


class _Planner(DefaultLoadPlanner):
    """PyTorch's planner; values that are no tensors are loaded without running code."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))
