"""Sharded checkpoints: folders with one safetensors file per process, readable on any number of processes.

`process-R.safetensors` holds process R's parts of the tensors, `meta.pt` all other values. PyTorch's safetensors reader
assembles the parts. Its writer is not used, because it silently drops values that are not tensors and needs memory for
two more copies of the tensors. Independent of Lightning.
"""

import json
import math
import shutil
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from revdeq_lightning.checkpoints.files import (
    checksums,
    make_folder,
    put_in_place,
    reason_of,
    remove,
    sync,
    write_checkpoint,
    write_checksums,
)
from revdeq_lightning.checkpoints.names import REST
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.processes import gathered

WEIGHTS, TRAINED = "state_dict", "trained_weights"
VALUES = "values"
"""Key in `meta.pt` for the saved states' values that are not tensors, such as optimizer settings."""


def write_folder(checkpoint: dict[str, Any], target: Path) -> OSError | None:
    """Write a checkpoint as a folder, which gets its name when it is complete; all processes must call it.

    Returns:
        On all processes, the error of the one that could not write, if any.
    """
    is_first = dist.get_rank() == 0
    part = target.with_name(f".{target.name}.part")
    state = {key: checkpoint.pop(key) for key in (WEIGHTS, TRAINED) if key in checkpoint}
    state |= {f"optimizer_{i}": own for i, own in enumerate(checkpoint.pop("optimizer_states", []))}

    def begin() -> None:
        remove(part)
        make_folder(part)

    def finish() -> None:
        write_checkpoint(checkpoint | {VALUES: other_values(state)}, part / REST)
        write_checksums(part, checksums([part / REST]) | dict(ChainMap(*sums)))
        put_in_place(part, target)

    try:
        _together(begin, is_first)
        sums = _together(lambda: write_part(state, part, dist.get_rank()))
        _together(finish, is_first)
    except OSError as error:
        if is_first:
            shutil.rmtree(part, ignore_errors=True)  # the disk may be full
        return error
    return None


def _together(act: Callable[[], Any], is_acting: bool = True) -> list[Any]:
    """Call `act` on the acting processes; return all results, or raise one process's `OSError` on all."""
    result = fault = None
    if is_acting:
        try:
            result = act()
        except OSError as error:
            fault = error
    results, faults = zip(*gathered((result, fault)), strict=True)
    for fault in filter(None, faults):
        raise fault
    return list(results)


def write_part(state: dict[str, Any], folder: Path, rank: int) -> dict[str, str]:
    """Write and sync this process's parts of a nested state's tensors.

    The first process also writes the tensors that are not sharded, which are the same on all processes.

    Returns:
        The SHA-256 of the file, by name.
    """
    parts: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    for name, holder, key in leaves(state):
        value = holder[key]
        if isinstance(value, DTensor):
            (chunk,) = cast(Any, value).__create_chunk_list__()
            part, offsets = value.to_local(), list(chunk.offsets)
        elif isinstance(value, Tensor) and rank == 0:
            part, offsets = value, [0] * value.dim()
        else:
            continue
        if part.numel() or rank == 0:
            parts[name], places[name] = part.detach().cpu().contiguous(), {"saved_offsets": offsets}
    path = folder / f"process-{rank}.safetensors"
    try:
        save_file(parts, path, {"DCP_SHARDING_INFO": json.dumps(places)})  # the format of PyTorch's reader
    except SafetensorError as error:
        raise OSError(f"the file could not be written; is the disk full? ({error})") from None
    sync(path)
    return checksums([path])


def other_values(state: dict[str, Any]) -> dict[str, Any]:
    """A nested state's values that are not tensors, by dotted names."""
    return {name: holder[key] for name, holder, key in leaves(state) if not isinstance(holder[key], Tensor)}


def load_into(state: dict[str, Any], path: Path, values: dict[str, Any], *, no_dist: bool = False) -> None:
    """Fill a nested state: tensors from the folder, only this process's parts, and everything else from `values`.

    Raises:
        CheckpointError: If something is missing, has a different shape, or cannot be read, or the folder has other
            weights, too.
    """
    held = held_tensors(path)
    tensors: dict[str, Any] = {}
    for name, holder, key in leaves(state):
        value = holder[key]
        is_tensor = isinstance(value, Tensor)
        shape = tuple(held[name].size) if name in held else None
        if (shape != tuple(value.shape)) if is_tensor else (name not in values):
            wanted = f" of shape {tuple(value.shape)}" if is_tensor else ""
            found = f"holds {shape}" if shape is not None else "has none"
            raise CheckpointError(f"the checkpoint does not fit the model: it needs {name}{wanted}, {path} {found}")
        if is_tensor:
            tensors[name] = value
        else:
            holder[key] = values[name]
    others = [name for name in held if name.startswith(f"{WEIGHTS}.") and name not in tensors]
    if WEIGHTS in state and others:
        raise CheckpointError(f"the checkpoint does not fit the model, which has no {others[0]}: {path}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as requested
            load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)
    except CheckpointException as error:  # not an `Exception`: it would end only this process
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{path} {reason_of(reason)} (found by process {rank})") from None


def read_whole(path: Path, *names: str) -> dict[str, Any]:
    """The complete tensors of the named states (`state_dict`, `optimizer_0`, ...), read by this process alone."""
    found: dict[str, Any] = {name: {} for name in names}
    for key, entry in held_tensors(path).items():
        name, _, rest = key.partition(".")
        if name in names:
            found[name][rest] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load_into(found, path, {}, no_dist=True)
    return found


def held_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes of a folder's tensors, by dotted names; CheckpointError if they cannot be read."""
    try:
        held: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        for name, entry in held.items():
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ValueError(f"parts of {name} are missing")
    except Exception as error:  # invalid files raise many types
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a sharded checkpoint ({type(error).__name__}: {reason})") from None
    return dict(held)


def leaves(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Dotted name of each value in nested dictionaries, with the dictionary that holds it and its key there."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", state, key
