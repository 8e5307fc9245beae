"""A solve without gradient, and a recorded evaluation at its result that carries the gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...transforms import is_backward_compiled, is_transformed, outside_of_compilers
from ..function import EquilibriumFunction, evaluate_recorded, graph_leaves, vector_jacobian_products
from ..loop import iterate_to_fixed_point
from ..norms import Leaves, join, scaled
from ..solution import SolverStats
from ..solvers.base import AbstractSolver


def solve_without_gradient(f: EquilibriumFunction, z0: Leaves, solver: AbstractSolver) -> tuple[Leaves, SolverStats]:
    """Run the solver; nothing is recorded."""
    with torch.no_grad():
        iteration = iterate_to_fixed_point(solver, f, z0)
    return [v.detach() for v in iteration.value], iteration.stats


def solve_with_cotangents(
    f: EquilibriumFunction,
    z0: Leaves,
    solver: AbstractSolver,
    cotangents: "Callable[[AdjointSystem, SolverStats, Leaves], Leaves]",
) -> tuple[Leaves, SolverStats]:
    """Solve, and evaluate f once more at the result z, recorded: in the backward pass it takes the place of z.

    `cotangents` makes from J = df/dz there (the system) and the gradient in z that in f(z, x). As f is called in the
    forward pass, autograd sees all that f uses, a closure's tensors too.
    """
    value, stats = solve_without_gradient(f, z0, solver)
    if not torch.is_grad_enabled():
        return value, stats
    state, recorded = evaluate_recorded(f, value)
    stats.forward_nfe = f.nfe
    if {*map(id, graph_leaves(recorded))} <= {*map(id, state)} and not any(z.requires_grad for z in z0):
        return value, stats
    system = AdjointSystem(state, recorded)
    return attach(value, recorded, z0, partial(cotangents, system, stats)), stats


class AdjointSystem:
    """`w -> J^T w + g` as a function for the solvers, scaled so that g has norm 1 in every sample."""

    def __init__(self, state: Leaves, value: Leaves) -> None:
        self.state, self.value = state, value

    def begin(self, grads: Leaves) -> Leaves:
        """Take g up; returns it scaled, the first iterate."""
        if is_backward_compiled():
            raise RuntimeError(
                "compiled autograd frees what the products with the Jacobian need: leave"
                " torch._dynamo.config.compiled_autograd off, or use ReversibleAdjoint() or BackpropAdjoint()"
            )
        self.num_products = 0
        self.dtypes = [g.dtype for g in grads]
        wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
        norms = torch.linalg.vector_norm(join(wide), dim=1)
        self.norms = torch.where(norms > 0, norms, 1.0)
        self.cotangent = scaled(wide, 1 / self.norms)
        return self.cotangent

    def __call__(self, w: Leaves) -> Leaves:
        self.num_products += 1
        weights = [a.to(v.dtype) for a, v in zip(scaled(w, self.norms), self.value, strict=True)]
        products = vector_jacobian_products(self.value, self.state, weights, retain_graph=True)
        filled = [torch.zeros_like(a) if p is None else p.to(a.dtype) for a, p in zip(w, products, strict=True)]
        return [p + g for p, g in zip(scaled(filled, 1 / self.norms), self.cotangent, strict=True)]

    def end(self, w: Leaves) -> Leaves:
        """The solution in the scale and dtype of g."""
        return [a.to(dtype) for a, dtype in zip(scaled(w, self.norms), self.dtypes, strict=True)]


def attach(value: Leaves, carrier: Leaves, z0: Leaves, cotangents: Callable[[Leaves], Leaves]) -> Leaves:
    """`value`, whose gradient g goes to `carrier` as `cotangents(g)`, and to z0 as zeros.

    Zeros rather than nothing: a learned z0 would otherwise count as unused, for example under DDP.
    """
    if is_transformed():
        return [v + (c - c.detach()) for v, c in zip(value, cotangents(carrier), strict=True)]
    return list(_Attached.apply(value, cotangents, len(z0), *z0, *carrier))


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Leaves, cotangents: Any, num_z0: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        # Not `value` itself: its tensors become the outputs, which know of ctx.
        ctx.cotangents = cotangents
        ctx.z0 = [(z.shape, z.dtype, z.device) for z in inputs[:num_z0]]
        return tuple(v.detach() for v in value)

    @staticmethod
    @outside_of_compilers
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if is_needed else None
            for (shape, dtype, device), is_needed in zip(ctx.z0, needed, strict=False)
        ]
        carried = ctx.cotangents(list(grads)) if any(needed[len(zeros) :]) else [None] * len(grads)
        return (None, None, None, *zeros, *carried)
