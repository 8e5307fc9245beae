"""A small map whose implicit gradient a dense solve gives, and the adjoints that are measured by it."""

import pytest
import torch
from against_bptt import attention_layer
from torch import Tensor, nn

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BroydenSolver,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
    solve_fixed_point,
)

EVERY_SOLVER = {
    "picard": PicardSolver,
    "relaxed": RelaxedSolver,
    "reversible": ReversibleSolver,
    "momentum": MomentumSolver,
    "anderson": AndersonSolver,
    "broyden": BroydenSolver,
}

with_every_solver = pytest.mark.parametrize("make", EVERY_SOLVER.values(), ids=EVERY_SOLVER)

TIGHT = ImplicitAdjoint(solver=AndersonSolver(max_steps=100, rtol=1e-12))

ADJOINTS = [
    ImplicitAdjoint(solver=AndersonSolver(max_steps=60, rtol=1e-10), unconverged="ignore"),
    PhantomAdjoint(),
    PhantomAdjoint(kind="neumann"),
]

with_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=["implicit", "unrolled", "neumann"])


class TanhMap(nn.Module):
    """f(z, x) = tanh(W z + x) + mixing * the mean over the batch, W random of the given norm; counts its calls."""

    def __init__(self, norm: float = 0.8, mixing: float = 0.0, dim: int = 6) -> None:
        super().__init__()
        weight = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(norm * weight / torch.linalg.matrix_norm(weight, 2))
        self.mixing = mixing
        self.calls = self.backward_calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        value = torch.tanh(z @ self.weight.T + x) + self.mixing * z.mean(0)
        if value.requires_grad:
            value.register_hook(self._count)
        return value

    def _count(self, gradient: Tensor) -> None:
        self.backward_calls += 1


def inputs(batch: int = 3, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, dim, dtype=torch.float64, generator=generator).requires_grad_()


def solve(f, x, solver, adjoint, z0=None):
    return solve_fixed_point(f, torch.zeros_like(x) if z0 is None else z0, x, solver=solver, adjoint=adjoint)


def dense_implicit_gradients(f, z, x, *parameters):
    """`(I - J^T)^-1` as a matrix over the whole batch."""
    z = z.detach()
    flat = lambda v: f(v.view_as(z), x.detach()).flatten()  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(flat, z.flatten())
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)  # as in `gradients`
    w = torch.linalg.solve((torch.eye(len(jacobian), dtype=z.dtype) - jacobian).T, g.flatten())
    grads = torch.autograd.grad(f(z, x), (x, *parameters), w.view_as(z))
    return torch.cat([gradient.flatten() for gradient in grads])


class Damped(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, z, x):
        return 0.4 * torch.tanh(self.f(z, x)) + x


def damped_layer(solver, adjoint, **settings):
    layer = attention_layer(solver, adjoint, **settings)
    layer.f = Damped(layer.f)
    return layer
