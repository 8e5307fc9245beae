"""What passes between the host and the device of a run, so that the host does not wait for the device."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; `Tensor.to` would wait until everything before it is done."""
    if tensor.is_cpu and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """These float32 numbers on the device, made once; not to be changed."""
    with torch.inference_mode(False):  # also the first call's result can be used in training
        return send(torch.tensor(values), device)


def read(numbers: Sequence[Tensor]) -> list[Tensor]:
    """0-dim tensors on the host, after one wait for the device."""
    together = torch.stack([number.double() for number in numbers]).cpu()
    return [value.to(number.dtype) for value, number in zip(together, numbers, strict=True)]
