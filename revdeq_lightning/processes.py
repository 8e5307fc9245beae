"""What the processes of a run exchange: objects, and the tensors that FSDP2 shards."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def gathered(value: Any) -> list[Any]:
    """This value of every process, by rank; all processes must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_sharded(value: Any) -> bool:
    """Whether this is a tensor of which each process holds a part."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, the same memory; of an ordinary tensor the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process: each must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shared_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, sharded as `like` is and on its device; nothing is communicated."""
    tensor = tensor.to(like.device)
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
