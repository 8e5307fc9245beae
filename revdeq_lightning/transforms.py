"""What PyTorch may do around a call: transform, trace and compile it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

is_functorch = torch._C._are_functorch_transforms_active
"""Whether `torch.func` (grad, vmap, jvp, ...) transforms the operations."""

Solve = TypeVar("Solve", bound=Callable[..., Any])


def is_forward_mode() -> bool:
    """Whether tensors may carry tangents (dual numbers, `torch.func.jvp`), which `no_grad` does not stop."""
    return torch.autograd.forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether only operations that every transform knows may be used."""
    return is_forward_mode() or is_functorch()


def is_traced() -> bool:
    """Whether operations are recorded for a program without Python, such as that of `torch.export`."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def has_numbers(tensor: Tensor) -> bool:
    """Whether the host can look at the numbers of a tensor."""
    is_fake = isinstance(tensor, torch._subclasses.FakeTensor)
    return not (is_fake or is_traced() or is_functorch())


def outside_of_compilers(solve: Solve) -> Solve:
    """`torch.compile` of what is around breaks its graph here: in a program of its own the solve has other bits."""
    uncompiled = _disable_dynamo(solve)  # `torch.compiler.disable` would import the compiler, which takes a second

    @functools.wraps(solve)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (uncompiled if torch.compiler.is_dynamo_compiling() else solve)(*args, **kwargs)

    return cast(Solve, call)
