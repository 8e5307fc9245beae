"""A solve without gradient, and a recorded evaluation at its result that carries the gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..function import EquilibriumFunction, evaluate_recorded, graph_leaves
from ..loop import iterate_to_fixed_point
from ..norms import Leaves
from ..solution import SolverStats
from ..solvers.base import AbstractSolver

Cotangents = Callable[[Leaves], Leaves]


def solve_without_gradient(
    f: EquilibriumFunction, z0: Leaves, x: Sequence[Any], solver: AbstractSolver
) -> tuple[Leaves, SolverStats]:
    """Run the solver; nothing is recorded."""
    with torch.no_grad():
        iteration = iterate_to_fixed_point(solver, f, z0, x)
    return [v.detach() for v in iteration.value], iteration.stats


def record_at(
    f: EquilibriumFunction, z: Leaves, z0: Leaves, x: Sequence[Any], stats: SolverStats
) -> tuple[Leaves, Leaves] | None:
    """Fresh leaves with the values of z, and f of them, recorded; None where nothing needs a gradient.

    As f is called in the forward pass, autograd sees all that f uses, a closure's tensors too.
    """
    if not torch.is_grad_enabled():
        return None
    state, value = evaluate_recorded(f, z, x)
    stats.forward_nfe = f.nfe
    own = {id(leaf) for leaf in state}
    is_needed = any(id(leaf) not in own for leaf in graph_leaves(value)) or any(z.requires_grad for z in z0)
    return (state, value) if is_needed else None


def attach(value: Leaves, carrier: Leaves, z0: Leaves, cotangents: Cotangents) -> Leaves:
    """`value`, whose gradient g goes to `carrier` as `cotangents(g)`, and to z0 as zeros.

    Zeros rather than nothing: a z0 that is learnt would otherwise count as unused, under DDP for instance.
    """
    return list(_Attached.apply(value, cotangents, len(z0), *z0, *carrier))


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Leaves, cotangents: Cotangents, num_z0: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        # Not `value` itself: its tensors become the outputs, which know of ctx.
        ctx.cotangents = cotangents
        ctx.z0 = [(z.shape, z.dtype, z.device) for z in inputs[:num_z0]]
        return tuple(v.detach() for v in value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if is_needed else None
            for (shape, dtype, device), is_needed in zip(ctx.z0, needed, strict=False)
        ]
        if not any(needed[len(zeros) :]):
            return (None, None, None, *zeros, *(None for _ in grads))
        return (None, None, None, *zeros, *ctx.cotangents(list(grads)))
