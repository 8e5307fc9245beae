"""What the solvers are compared with: plain loops that share no code with `revdeq_lightning.equilibrium`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Map = Callable[[Tensor, Tensor], Tensor]


def reversible_loop(
    f: Map, z0: Tensor, x: Tensor, *, beta: float, num_steps: int, state_dtype: torch.dtype = torch.float64
) -> Tensor:
    """The paper's iteration; autograd through it is back-propagation through time (BPTT). 2 evaluations of f a step."""
    y = z = z0.to(state_dtype)
    for _ in range(num_steps):
        y = (1 - beta) * y + beta * f(z.to(z0.dtype), x).to(state_dtype)
        z = (1 - beta) * z + beta * f(y.to(z0.dtype), x).to(state_dtype)
    return z.to(z0.dtype)


def momentum_loop(
    f: Map, z0: Tensor, x: Tensor, *, momentum: float, num_steps: int, state_dtype: torch.dtype = torch.float64
) -> Tensor:
    """Plain iteration with momentum, 1 evaluation of f a step."""
    before = z = z0.to(state_dtype)
    for _ in range(num_steps):
        before, z = z, f(z.to(z0.dtype), x).to(state_dtype) + momentum * (z - before)
    return z.to(z0.dtype)


def checkpointed(f: Map) -> Map:
    """`f` whose activations are computed again in the backward pass."""
    return lambda z, x: checkpoint(f, z, x, use_reentrant=False)


def bare_evaluations(f: Map, z: Tensor, x: Tensor, parameters: Sequence[Tensor], num_evaluations: int) -> None:
    """The calls of f that a reversible training step cannot do without, and nothing else.

    Each evaluation once plain, and once with its vector-Jacobian products for z, x and every parameter.
    """
    with torch.no_grad():
        for _ in range(num_evaluations):
            f(z, x)
    for _ in range(num_evaluations):
        leaf = z.detach().requires_grad_()
        value = f(leaf, x)
        torch.autograd.grad(value, [leaf, x, *parameters], z)
