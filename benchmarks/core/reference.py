"""Reference for the solvers: plain loops that share no arithmetic with `revdeq_lightning.equilibrium`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revdeq_lightning.equilibrium import EquilibriumLayer, FixedPointSolution, ReversibleSolver

Map = Callable[[Tensor, Tensor], Tensor]


def reversible_loop(
    f: Map, z0: Tensor, x: Tensor, *, beta: float, num_steps: int, state_dtype: torch.dtype = torch.float64
) -> Tensor:
    """The paper's iteration, 2 evaluations of f per step; autograd gives backpropagation through time (BPTT)."""
    y = z = z0.to(state_dtype)
    for _ in range(num_steps):
        y, z = reversible_step_pair(f, y, z, x, beta=beta, dtype=z0.dtype)
    return z.to(z0.dtype)


def reversible_step_pair(
    f: Map, y: Tensor, z: Tensor, x: Tensor, *, beta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One step of the paper's iteration, f in `dtype`."""
    y = (1 - beta) * y + beta * f(z.to(dtype), x).to(y.dtype)
    z = (1 - beta) * z + beta * f(y.to(dtype), x).to(z.dtype)
    return y, z


def momentum_loop(
    f: Map, z0: Tensor, x: Tensor, *, momentum: float, num_steps: int, state_dtype: torch.dtype = torch.float64
) -> Tensor:
    """Plain iteration with momentum, 1 evaluation of f per step."""
    before = z = z0.to(state_dtype)
    for _ in range(num_steps):
        before, z = z, f(z.to(z0.dtype), x).to(state_dtype) + momentum * (z - before)
    return z.to(z0.dtype)


def checkpointed(f: Map) -> Map:
    """`f` with activations recomputed in the backward pass."""
    return lambda z, x: checkpoint(f, z, x, use_reentrant=False)


def bare_evaluations(f: Map, z: Tensor, x: Tensor, parameters: Sequence[Tensor], num_evaluations: int) -> None:
    """The calls of f that a reversible training step requires, and nothing else.

    Each evaluation once plain, and once with its vector-Jacobian products for z, x, and every parameter.
    """
    with torch.no_grad():
        for _ in range(num_evaluations):
            f(z, x)
    for _ in range(num_evaluations):
        leaf = z.detach().requires_grad_()
        value = f(leaf, x)
        torch.autograd.grad(value, [leaf, x, *parameters], z)


class PlainLoop(nn.Module):
    """Replacement of an `EquilibriumLayer` by the loops above; a tuple state becomes one flat tensor."""

    def __init__(self, layer: EquilibriumLayer) -> None:
        super().__init__()
        self.f, self.solver, self.num_parts = layer.f, layer.solver, layer.num_parts

    def forward(self, x: Any, z0: Any = None) -> FixedPointSolution:
        """The last state; there are no statistics."""
        if isinstance(x, Tensor):
            return FixedPointSolution(self.solve(self.f, torch.zeros_like(x) if z0 is None else z0, x), None)
        start = [torch.zeros_like(t) for t in x] if z0 is None else z0
        value = self.solve(lambda z, x: join(self.f(split(z, x), x)), join(start), x)
        return FixedPointSolution(split(value, x), None)

    def solve(self, f: Any, start: Tensor, x: Any) -> Tensor:
        steps = {"num_steps": self.solver.max_steps}
        if isinstance(self.solver, ReversibleSolver):
            return reversible_loop(f, start, x, beta=self.solver.beta, **steps)
        return momentum_loop(f, start, x, momentum=self.solver.momentum, **steps)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Join several tensors into one of shape `(batch, elements)`."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def split(z: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = z.split([part[0].numel() for part in like], dim=1)
    return tuple(part.view(t.shape) for part, t in zip(parts, like, strict=True))


def with_plain_loops(model: nn.Module) -> nn.Module:
    """Replace the equilibrium layers of a model by `PlainLoop`, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, EquilibriumLayer):
                setattr(module, name, PlainLoop(child))
    return model
