"""The implicit adjoint: the gradient of the fixed point itself, by the implicit function theorem.

With J = df/dz at the fixed point and g = dL/dz:

    w = J^T w + g                           a linear fixed-point problem, solved by any solver
    dL/dtheta = (df/dtheta)^T w             and the same for x
"""

import math
from dataclasses import dataclass, field
from typing import get_args

import torch

from ...errors import DivergenceError
from ...transforms import is_forward_mode, is_functorch
from ..function import EquilibriumFunction
from ..loop import deferred_errors, iterate_to_fixed_point
from ..norms import Leaves
from ..solution import SolverStats
from ..solvers.anderson import AndersonSolver
from ..solvers.base import AbstractSolver
from ..validation import require_choice
from .attached import AdjointSystem, solve_with_cotangents
from .base import AbstractAdjoint, Policy, report


class ConvergenceWarning(UserWarning):
    """The fixed point or the backward linear system was not solved to its tolerance: the gradient is approximate."""


class ConvergenceError(RuntimeError):
    """Raised instead of `ConvergenceWarning` if the policy is "raise"."""


@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(AbstractAdjoint):
    """The gradient of the fixed point, for every solver; memory of one evaluation of f.

    It costs one more evaluation of f in the forward pass, and in the backward pass one vector-Jacobian product for each
    step of the linear solver. It assumes that a fixed point was reached. Otherwise the gradient is off by about the
    residual over one minus the contraction of f, and where f has no fixed point it is meaningless (relative error 0.9
    on an untrained transformer block): there use `ReversibleAdjoint` or `BackpropAdjoint`, of the iterates.

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

    def solve(self, f: EquilibriumFunction, z0: Leaves, solver: AbstractSolver) -> tuple[Leaves, SolverStats]:
        self.refuse_transforms(is_forward_mode() or (is_functorch() and torch.is_grad_enabled()))
        errors = deferred_errors.get()  # asked here: the backward pass may run in another thread

        def cotangents(system: AdjointSystem, stats: SolverStats, grads: Leaves) -> Leaves:
            self.refuse_double_backward()
            self.refuse_transforms(is_functorch() or torch._C._functorch.is_legacy_batchedtensor(grads[0]))
            if errors:  # of a solve that has diverged already
                return [torch.full_like(g, math.nan) for g in grads]
            start = system.begin(grads)
            try:
                solution = iterate_to_fixed_point(self.solver, system, start)
            except DivergenceError as error:
                diverged = DivergenceError(
                    "the linear system of ImplicitAdjoint's backward pass diverged: df/dz at the result expands too"
                    f" much for its solver, or is not finite. Forward solver: {solver}. In the linear solve, {error}"
                )
                if errors is None:
                    raise diverged from error
                errors.append(diverged)
                return [torch.full_like(g, math.nan) for g in grads]
            stats.backward_nfe = 0
            stats.backward_num_products = system.num_products
            stats.backward_relative_residual = solution.stats.relative_residual
            if self.unconverged != "ignore":
                self._report(solution.stats, solver, stats)
            return system.end(solution.value)

        return solve_with_cotangents(f, z0, solver, cotangents)

    def _report(self, backward: SolverStats, solver: AbstractSolver, stats: SolverStats) -> None:
        solves = [
            ("the backward linear system", backward, backward.converged, self.solver),
            ("the fixed point, where alone the formula holds,", stats, stats.converged, solver),
        ]
        if bool(torch.stack([converged for _, _, converged, _ in solves if converged is not None]).all()):
            return  # asked of the device once
        problems = [
            f"{name} has not converged in {int((~converged).sum())} of {converged.numel()} samples: largest relative"
            f" residual {float(of.relative_residual.max()):.3g} after {int(of.num_steps.max())} steps of {by}"
            for name, of, converged, by in solves
            if converged is not None and not bool(converged.all())
        ]
        message = (
            f"the implicit gradient is approximate: {'; '.join(problems)}. Raise max_steps or the tolerance, make f"
            " contract (Jacobian regularization, normalized weights), or use ReversibleAdjoint or"
            " BackpropAdjoint"
        )
        report(self.unconverged, message, ConvergenceWarning, ConvergenceError)
