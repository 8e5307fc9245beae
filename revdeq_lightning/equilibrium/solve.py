"""The entry point: `solve_fixed_point` finds z with f(z, x) = z and makes it differentiable."""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..transforms import is_recorded, is_traced, outside_of_compilers
from .adjoints.base import AbstractAdjoint
from .adjoints.implicit import ImplicitAdjoint
from .adjoints.phantom import PhantomAdjoint
from .checks import settle_checks
from .function import EquilibriumFunction, modules
from .norms import Leaves, Map
from .solution import FixedPointSolution
from .solvers.base import AbstractSolver
from .validation import require_count


@outside_of_compilers
def solve_fixed_point(
    f: Map, z0: Any, x: Any, *, solver: AbstractSolver, adjoint: AbstractAdjoint
) -> FixedPointSolution:
    """Find z with `f(z, x) = z` and make it differentiable.

    The solver decides the iterates, the adjoint how gradients are computed.

    Args:
        f: Map `(z, x) -> z` with the structure, shapes and dtypes of `z0`, the same function in forward and backward.
            With `ReversibleAdjoint` everything that needs a gradient must be a parameter of the module f, or in x or
            z0. All calls of one solve draw the same random numbers: one dropout mask per solve.
        z0: Initial state, a tensor of shape `(batch, ...)` or a pytree of them with a common batch size.
            Differentiated. Under autocast float16 and bfloat16 are raised to float32.
        x: Injected input, any pytree; its tensors are differentiated.
        solver: Iteration and stopping rule. A step of `ReversibleSolver` is 2 evaluations of f, of the others 1.
        adjoint: Gradient rule. Each step adds its activations to the memory of `BackpropAdjoint`, a few bits for each
            element of z to that of `ReversibleAdjoint`, and nothing to that of the others.
            `ReversibleAdjoint` and `BackpropAdjoint` differentiate the iterates, `ImplicitAdjoint` the fixed point,
            `PhantomAdjoint` an approximation of it. Only `ReversibleAdjoint` needs a reversible solver.

    Returns:
        `value`, structure and dtypes of `z0`, and `stats` (see `SolverStats`).

    Raises:
        ValueError: If the adjoint does not support the solver or f, if z0 is not as above, or if f changes the
            structure, shape, dtype or device of z.
        DivergenceError: If the state becomes non-finite or leaves the range of its arithmetic; within
            `deferred_divergence` the value is NaN instead. On a GPU, where the host does not wait for each solve, the
            value is NaN at first, and a later solve or `settle_checks()` raises.

    Source: McCallum et al. 2025, arXiv:2509.12917, section 3.
    """
    require_solver_and_adjoint(solver, adjoint)
    settle_checks(wait=False)
    z_leaves, z_spec = tree_flatten(z0)
    z_leaves = _checked_state(z_leaves)
    function = EquilibriumFunction(f, z_leaves, z_spec, x)
    if is_traced() and any(module.training for module in modules(f)):
        raise ValueError(f"a solve is exported in evaluation mode only: call {type(f).__name__}.eval(), or the model's")
    if is_recorded() and torch.is_grad_enabled():
        raise ValueError("make_fx would record a solve with another gradient: call it within torch.no_grad()")
    with torch.no_grad() if is_traced() else contextlib.nullcontext():
        value, stats = adjoint.solve(function, z_leaves, solver)
    # Memory of its own, whatever f and the gradient keep; a traced program has no gradient.
    value = [(v.detach() if is_traced() else v).clone() for v in value]
    return FixedPointSolution(tree_unflatten(value, z_spec), stats)


@outside_of_compilers
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
        f: Map `(z, x) -> z`, as in `solve_fixed_point`.
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
        z0 = tree_map(lambda v: v.detach().clone() if is_detached else v.clone(), solutions[-1].value)
    return solutions[-1]._replace(earlier=tuple(solutions[:-1]))


def require_solver_and_adjoint(solver: Any, adjoint: Any) -> None:
    """Raise ValueError unless both are what their names say and fit together."""
    if not isinstance(solver, AbstractSolver):
        raise ValueError(f"solver must be a solver such as ReversibleSolver(), got {solver!r}")
    if not isinstance(adjoint, AbstractAdjoint):
        raise ValueError(f"adjoint must be an adjoint such as ReversibleAdjoint(), got {adjoint!r}")
    adjoint.check(solver)


def _checked_state(leaves: list[Any]) -> Leaves:
    if not leaves:
        raise ValueError("z0 must hold at least one tensor, got an empty structure")
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim == 0:
            received = f"{leaf.dtype} of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
            raise ValueError(f"z0 must be floating-point tensors of shape (batch, ...), got {received}")
        if leaf.numel() == 0:
            raise ValueError(f"z0 must not be empty: batch and other sizes at least 1, got shape {tuple(leaf.shape)}")
    batch_sizes = [leaf.shape[0] for leaf in leaves]
    devices = {leaf.device for leaf in leaves}
    if any(size != batch_sizes[0] for size in batch_sizes) or len(devices) > 1:
        received = f"{batch_sizes} on {sorted(map(str, devices))}"
        raise ValueError(f"the tensors of z0 must share one device and one batch size, got {received}")
    if torch.is_autocast_enabled(leaves[0].device.type):
        # The state must not drift in half precision: f itself still computes in it.
        return [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
    return leaves
