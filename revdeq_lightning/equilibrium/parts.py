"""A solve in parts that continue from each other's result, all of them differentiable."""

import dataclasses
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from .adjoints.base import AbstractAdjoint
from .adjoints.implicit import ImplicitAdjoint
from .adjoints.phantom import PhantomAdjoint
from .norms import Map
from .solution import FixedPointSolution
from .solve import require_solver_and_adjoint, solve_fixed_point
from .solvers.base import AbstractSolver
from .validation import require_count


def solve_in_parts(
    f: Map, z0: Any, x: Any, *, solver: AbstractSolver, adjoint: AbstractAdjoint, num_parts: int
) -> FixedPointSolution:
    """As `solve_fixed_point`, in parts that continue from each other's result, for losses on the way to the end.

    Fixed-point correction: `sum_k decay^(n - 1 - k) * loss(z_k)` over the states z_k at the ends of the n parts makes
    the solver's early states useful too, so that the model can be evaluated with fewer steps.

    Each part is a solve of its own: solvers that look back at earlier iterates forget them. The gradient of a later
    state runs through the earlier ones if the adjoint has a gradient in z0 (`ReversibleAdjoint` and `BackpropAdjoint`).
    The earlier states are no fixed points: `ImplicitAdjoint` gives them the Jacobian-free gradient,
    `PhantomAdjoint(num_steps=1, beta=1)`.

    Args:
        f: As of `solve_fixed_point`, as are z0 and x.
        z0: Initial state.
        x: Injected input.
        solver: Its `max_steps` are divided among the parts, the later ones getting the remainder.
        adjoint: Gradient rule of every part.
        num_parts: At least 1; more than `max_steps` is as `max_steps`.

    Returns:
        The last part's solution, with `earlier` the others.

    Source: Bai et al. 2022, arXiv:2204.08442 (correction); torchdeq, arXiv:2310.18605 (`DEQSliced`).
    """
    require_count("num_parts", num_parts)
    require_solver_and_adjoint(solver, adjoint)
    num_parts = min(num_parts, solver.max_steps)
    is_detached = isinstance(adjoint, ImplicitAdjoint | PhantomAdjoint)  # they would send zeros back through z0
    on_the_way = PhantomAdjoint(num_steps=1, beta=1.0) if isinstance(adjoint, ImplicitAdjoint) else adjoint
    solutions: list[FixedPointSolution] = []
    for k in range(num_parts):
        steps = solver.max_steps * (k + 1) // num_parts - solver.max_steps * k // num_parts
        part = dataclasses.replace(solver, max_steps=steps)
        rule = adjoint if k == num_parts - 1 else on_the_way
        solutions.append(solve_fixed_point(f, z0, x, solver=part, adjoint=rule))
        z0 = tree_map(Tensor.detach, solutions[-1].value) if is_detached else solutions[-1].value
    return solutions[-1]._replace(earlier=tuple(solutions[:-1]))
