"""Exchange objects between the processes of a run, and convert the tensors that FSDP2 shards."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_host_groups: dict[Any, Any] = {}


def host_group(timeout: timedelta | None = None) -> Any:
    """The group that exchanges what is on the host, so that no process waits for its device.

    All processes must make the first call together.
    """
    world = dist.group.WORLD
    if dist.get_backend(world) == "gloo":
        return world
    if world not in _host_groups:
        _host_groups.clear()  # of an earlier process group
        _host_groups[world] = dist.new_group(backend="gloo", timeout=timeout)
    return _host_groups[world]


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank; all processes must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=host_group())
    return values


def largest(numbers: Sequence[int]) -> list[int]:
    """The largest of each number over the processes; all processes must call it."""
    return _reduced(numbers, "MAX")


def summed(numbers: Sequence[int]) -> list[int]:
    """The sum of each number over the processes; all processes must call it."""
    return _reduced(numbers, "SUM")


def _reduced(numbers: Sequence[int], operation: str) -> list[int]:
    values = torch.tensor(numbers)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, getattr(dist.ReduceOp, operation), group=host_group())
    reduced: list[int] = values.tolist()
    return reduced


def is_sharded(value: Any) -> bool:
    """Whether this is a tensor of which each process has a part."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor, on every process; all processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shared_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a complete tensor that every process has like `like`, on its device, without communication."""
    tensor = tensor.to(like.device)
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
