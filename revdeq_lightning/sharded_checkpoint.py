"""Checkpoints that are folders, one file a process (torch.distributed.checkpoint), read without running their code.

PyTorch's own reader unpickles whatever the folder holds. Here the metadata may name no classes but those of such
metadata, and every other value is loaded with `weights_only=True`. No Lightning in here.
"""

import dataclasses
import enum
import importlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

METADATA, REST = ".metadata", "meta.pt"
"""PyTorch's description of the tensors; what Lightning stores beside them."""
WEIGHTS, TRAINED = "state_dict", "trained_weights"

_PLAIN = {
    *(("torch", name) for name in ("Size", "device")),
    *(("builtins", name) for name in ("set", "frozenset", "slice", "bytearray", "complex")),
    *(("collections", name) for name in ("OrderedDict", "defaultdict")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "PurePath")),
}


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether this is a folder that a sharded checkpoint was written to."""
    return all((Path(path) / name).is_file() for name in (METADATA, REST))


def load_into(state: dict[str, Any], path: Path, *, no_dist: bool = False) -> None:
    """Fill the tensors of a nested state from the folder, each process its parts, and replace its other values.

    Raises:
        ValueError: If the folder lacks one of them, holds it in another shape, is damaged, or holds code.
    """
    metadata = read_metadata(path)
    held = metadata.state_dict_metadata
    for name, value in flatten_state_dict(state)[0].items():
        entry = held.get(name)
        shape = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if entry is None or (isinstance(value, torch.Tensor) and shape != tuple(value.shape)):
            wanted = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
            found = f"holds {shape}" if entry is not None else "has none"
            raise ValueError(f"the checkpoint does not fit the model: it needs {name}{wanted}, {path} {found}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked
            load(state, storage_reader=_Reader(path), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # no Exception: it would end the process in the midst of the others
        rank, (reason, _) = next(iter(error.failures.items()))
        text = next(iter(str(reason).splitlines()), "it is damaged")
        raise ValueError(f"{path} cannot be read (process {rank}, {type(reason).__name__}): {text}") from None


def read_whole(path: Path, *names: str) -> dict[str, Any]:
    """The named states (`state_dict`, `optimizer_0`, ...) in whole tensors, in this process alone.

    Raises:
        ValueError: If the folder holds code.
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
    """What Lightning stores beside the tensors: settings, position, callbacks."""
    rest: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
    return rest


def read_metadata(path: Path) -> Metadata:
    """Which tensors there are, and where.

    Raises:
        ValueError: If this is something else.
    """
    try:
        metadata = _MetadataUnpickler(io.BytesIO((path / METADATA).read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(f"{path} is not a sharded checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} is not a sharded checkpoint: its {METADATA} is a {type(metadata).__name__}")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what metadata is made of: records and enumerations of PyTorch's, dtypes, sizes, paths."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module.startswith("torch.distributed."):
            record = getattr(importlib.import_module(module), name.split(".")[0], None)
            for part in name.split(".")[1:]:
                record = getattr(record, part, None)
            if isinstance(record, type) and (dataclasses.is_dataclass(record) or issubclass(record, enum.Enum)):
                return record
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


class _Reader(FileSystemReader):
    """PyTorch's reader, once the metadata is known to hold no code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        read_metadata(Path(self.path))
        return super().read_metadata(*args, **kwargs)


class _Planner(DefaultLoadPlanner):
    """PyTorch's planner; values that are no tensors are loaded without running code."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)
