"""What PyTorch may do around a call: transform, trace and compile it."""

import functools
import sys
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


def is_recorded() -> bool:
    """Whether operations are recorded one by one, as `make_fx` does, which leaves out where a gradient ends."""
    is_proxied = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return is_proxied and not (is_functorch() or torch.compiler.is_exporting())


def is_traced() -> bool:
    """Whether operations are recorded for a program without Python, such as that of `torch.export`."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None or is_recorded()


def is_backward_compiled() -> bool:
    """Whether this is called in a backward pass that `torch.compile` has taken apart (compiled autograd)."""
    autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    return autograd is not None and autograd.in_compiled_autograd_region


def has_numbers(tensor: Tensor) -> bool:
    """Whether the host can look at the numbers of a tensor."""
    is_fake = isinstance(tensor, torch._subclasses.FakeTensor)
    return not (is_fake or is_traced() or is_functorch())


def outside_of_compilers(solve: Solve) -> Solve:
    """`torch.compile` of what is around breaks its graph here: in a program of its own the solve has other bits."""

    @_disable_dynamo  # `torch.compiler.disable` would import the compiler, which takes a second
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.compiled_autograd._disable():
            return solve(*args, **kwargs)

    reason = "an equilibrium is solved outside of compiled programs: no fullgraph=True, no strict=True in torch.export"
    vars(uncompiled).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)

    @functools.wraps(solve)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (uncompiled if torch.compiler.is_dynamo_compiling() else solve)(*args, **kwargs)

    return cast(Solve, call)
