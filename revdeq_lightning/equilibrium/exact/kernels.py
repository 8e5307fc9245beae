"""The exact state's updates for torch.compile: one pass over memory instead of ten, and as exact.

Products and sums of whole numbers below 2^52 are exact, so a compiler may fuse them as it likes. The states have the
bits of the eager operations where `c * u_k` is exact (c is 0 in the paper's solver, and the momentum where beta is 1);
elsewhere a fused sum may be rounded differently. Coefficients are tensors: for plain numbers torch.compile would make a
program for each solver.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def advance_(u_before: Tensor, u: Tensor, v: Tensor, word: Tensor, p: Tensor, q: Tensor, c: Tensor, b: Tensor) -> None:
    """Next state in the memory of `u_before`; its digit is pushed on `word`."""
    t = u_before * p
    quotient = torch.floor(t / q)
    word.copy_(t - q * quotient + q * word)
    u_before.copy_(_increment(u, v, c, b) + quotient)


def invert_(u_next: Tensor, u: Tensor, v: Tensor, word: Tensor, p: Tensor, q: Tensor, c: Tensor, b: Tensor) -> None:
    """Undo `advance_`: the state before `u` in the memory of `u_next`; its digit is popped off `word`."""
    shifted = torch.floor(word / q)
    digit = word - q * shifted
    word.copy_(shifted)
    u_next.copy_((digit + q * (u_next - _increment(u, v, c, b))) / p)


def carry_(g_previous: Tensor, g_current: Tensor, product: Tensor, a: Tensor, c: Tensor, b: Tensor) -> None:
    """The gradient back through one evaluation: `g_previous` becomes that in u_k, `g_current` that in u_{k-1}."""
    through_current = g_previous + b * product + c * g_current
    g_current.copy_(a * g_current)
    g_previous.copy_(through_current)


def _increment(u: Tensor, v: Tensor, c: Tensor, b: Tensor) -> Tensor:
    return torch.round(v.to(torch.float64) * b + u * c)


@functools.cache
def compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """One program for all shapes of as many dimensions; under a dispatch mode (a counter of FLOPs) it runs eagerly."""
    return torch.compile(kernel, dynamic=True)


@functools.lru_cache(maxsize=256)
def _as_tensor(number: float, device: torch.device) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, device=device)


def run(kernel: Callable[..., None], *arguments: Tensor | float) -> None:
    """Call the compiled kernel with tensors on one device, and numbers; RuntimeError if it cannot be compiled here."""
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    tensors = [x if isinstance(x, Tensor) else _as_tensor(float(x), device) for x in arguments]
    try:
        compiled(kernel)(*tensors)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"compiled=True: torch.compile failed ({reason}). It needs a C++ compiler on a CPU, Triton on a GPU;"
            " without compiled=True all is as exact, and slower"
        ) from error
