"""The implicit adjoint: the gradient of the fixed point itself, by the implicit function theorem.

With J = df/dz at the fixed point and g = dL/dz:

    w = J^T w + g                           a linear fixed-point problem, solved by any solver
    dL/dtheta = (df/dtheta)^T w             and the same for x
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..function import EquilibriumFunction, vector_jacobian_products
from ..loop import DivergenceError, divergence_errors, iterate_to_fixed_point
from ..norms import Leaves, broadcast_to_leaf, join
from ..solution import SolverStats
from ..solvers.anderson import AndersonSolver
from ..solvers.base import AbstractSolver
from ..validation import require_choice
from .attached import attach, record_at, solve_without_gradient
from .base import AbstractAdjoint

Policy = Literal["warn", "raise", "ignore"]


class ConvergenceWarning(UserWarning):
    """The fixed point or the backward linear system was not solved to its tolerance: the gradient is approximate."""


class ConvergenceError(RuntimeError):
    """As `ConvergenceWarning`, where asked to raise."""


@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(AbstractAdjoint):
    """The gradient of the fixed point, for every solver; memory of one evaluation of f.

    It costs one more evaluation of f in the forward pass, and in the backward pass one vector-Jacobian product for each
    step of the linear solver.

    It assumes that a fixed point was reached. Otherwise the gradient is off by about the residual over one minus the
    contraction of f, and where f has no fixed point it is meaningless (relative error 0.9 on an untrained pre-norm
    transformer block): there use `ReversibleAdjoint` or `BackpropAdjoint`, which differentiate the iterates.

    The cotangent of each sample is scaled to norm 1 for the linear solve, so that its tolerances do not depend on the
    scale of the loss. f may use any tensor. The gradient of z0 is 0. Keep the equilibrium out of checkpointed regions:
    every product would recompute the region.

    Args:
        solver: Solver of `w = J^T w + g`, with a tolerance.
        unconverged: What to do where w, or z for a forward solver with a tolerance, has not converged in some sample:
            "warn" (`ConvergenceWarning`), "raise" (`ConvergenceError`) or "ignore".

    Source: Bai et al. 2019, arXiv:1909.01377, theorem 1.
    """

    solver: AbstractSolver = field(default_factory=lambda: AndersonSolver(max_steps=50, rtol=1e-5))
    unconverged: Policy = "warn"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, AbstractSolver):
            raise ValueError(f"ImplicitAdjoint's solver must be one such as AndersonSolver(), got {self.solver!r}")
        if not self.solver.has_tolerance:
            raise ValueError(
                f"ImplicitAdjoint's solver needs a tolerance, got {self.solver!r}: set rtol=1e-5, say; for a fixed"
                " number of steps use PhantomAdjoint(kind='neumann')"
            )
        require_choice("unconverged", self.unconverged, get_args(Policy))

    def solve(
        self, f: EquilibriumFunction, z0: Leaves, x: Sequence[Any], solver: AbstractSolver
    ) -> tuple[Leaves, SolverStats]:
        value, stats = solve_without_gradient(f, z0, x, solver)
        recorded = record_at(f, value, z0, x, stats)
        if recorded is None:
            return value, stats
        system = AdjointSystem(*recorded)
        errors = divergence_errors()  # asked here: the backward pass may run in another thread

        def cotangents(grads: Leaves) -> Leaves:
            try:
                return self._cotangents(system, grads, solver, stats)
            except DivergenceError as error:
                if errors is None:
                    raise
                errors.append(error)
                return [torch.full_like(g, math.nan) for g in grads]

        return attach(value, recorded[1], z0, cotangents), stats

    def _cotangents(self, system: "AdjointSystem", grads: Leaves, solver: AbstractSolver, stats: SolverStats) -> Leaves:
        refuse_double_backward(self)
        start = system.begin(grads)
        try:
            solution = iterate_to_fixed_point(self.solver, system, start, ())
        except DivergenceError as error:
            raise DivergenceError(
                "the linear system of ImplicitAdjoint's backward pass diverged: df/dz at the result expands too much"
                f" for its solver, or is not finite. Forward solver: {solver}. In the linear solve, {error}"
            ) from error
        stats.backward_nfe = 0
        stats.backward_num_products = system.nfe
        stats.backward_relative_residual = solution.stats.relative_residual
        self._report(solution.stats, solver, stats)
        return system.end(solution.value)

    def _report(self, backward: SolverStats, solver: AbstractSolver, stats: SolverStats) -> None:
        if self.unconverged == "ignore":
            return
        assert backward.converged is not None
        converged = [backward.converged, *([stats.converged] if stats.converged is not None else [])]
        if bool(torch.stack(converged).all()):
            return
        problems = [
            f"{name} has not converged in {int((~of.converged).sum())} of {of.converged.numel()} samples: largest"
            f" relative residual {float(of.relative_residual.max()):.3g} after {int(of.num_steps.max())} steps of {by}"
            for name, of, by in (
                ("the backward linear system", backward, self.solver),
                ("the fixed point, where alone the formula holds,", stats, solver),
            )
            if of.converged is not None and not bool(of.converged.all())
        ]
        message = (
            f"the implicit gradient is approximate: {'; '.join(problems)}. Raise max_steps or the tolerance, make f"
            " contract (Jacobian regularization, normalized weights), or use ReversibleAdjoint or"
            " BackpropAdjoint"
        )
        if self.unconverged == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, ConvergenceWarning, stacklevel=2)


class AdjointSystem:
    """`w -> J^T w + g` as a function for the solvers, scaled so that g has norm 1 in every sample."""

    def __init__(self, state: Leaves, value: Leaves) -> None:
        self.state = state
        self.value = value
        self.nfe = 0
        """Vector-Jacobian products so far."""

    def begin(self, grads: Leaves) -> Leaves:
        """Take g up; returns it scaled, the first iterate."""
        self.nfe = 0
        self.dtypes = [g.dtype for g in grads]
        wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
        norms = torch.linalg.vector_norm(join(wide), dim=1)
        self.norms = torch.where(norms > 0, norms, 1.0)
        self.cotangent = self._scaled(wide, 1 / self.norms)
        return self.cotangent

    def products(self, w: Leaves) -> Leaves:
        """`J^T w`, in the scale of `begin`."""
        self.nfe += 1
        weights = [a.to(v.dtype) for a, v in zip(self._scaled(w, self.norms), self.value, strict=True)]
        products = vector_jacobian_products(self.value, self.state, weights, retain_graph=True)
        filled = [torch.zeros_like(a) if p is None else p.to(a.dtype) for a, p in zip(w, products, strict=True)]
        return self._scaled(filled, 1 / self.norms)

    def __call__(self, z: Leaves, x: Sequence[Any]) -> Leaves:
        return [p + g for p, g in zip(self.products(z), self.cotangent, strict=True)]

    def end(self, w: Leaves) -> Leaves:
        """The solution in the scale and dtype of g."""
        return [a.to(dtype) for a, dtype in zip(self._scaled(w, self.norms), self.dtypes, strict=True)]

    def _scaled(self, leaves: Leaves, factors: Tensor) -> Leaves:
        return [leaf * broadcast_to_leaf(factors.to(leaf.dtype), leaf) for leaf in leaves]


def refuse_double_backward(adjoint: AbstractAdjoint) -> None:
    """Raise where the backward pass itself would be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(adjoint).__name__} has no double backward, and create_graph=True was asked for: use"
            " BackpropAdjoint() for second derivatives"
        )
