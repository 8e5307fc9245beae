"""Backpropagation through time: autograd through every iterate of the solver, or through the last ones."""

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from ...transforms import is_transformed
from ..function import EquilibriumFunction
from ..loop import iterate_to_fixed_point
from ..norms import Leaves
from ..solution import SolverStats
from ..solvers.base import AbstractSolver
from ..validation import require_count
from .attached import attach
from .base import AbstractAdjoint


@dataclass(frozen=True, kw_only=True)
class BackpropAdjoint(AbstractAdjoint):
    """The exact gradient of the iteration with any solver, the reversible adjoint's twin; memory linear in evaluations.

    Args:
        checkpoint: Store only the iterates and evaluate f once more in the backward pass: less memory (still linear in
            the evaluations), a third more time.
        num_evaluations: Truncated BPTT: differentiate only this many of the last evaluations, with the state before
            them as a constant and 0 as the gradient of z0. Needs a solver without a tolerance. None: all, the exact
            gradient.
    """

    checkpoint: bool = False
    num_evaluations: int | None = None

    def __post_init__(self) -> None:
        if self.num_evaluations is not None:
            require_count("num_evaluations", self.num_evaluations)

    def solve(self, f: EquilibriumFunction, z0: Leaves, solver: AbstractSolver) -> tuple[Leaves, SolverStats]:
        if not torch.is_grad_enabled():
            iteration = iterate_to_fixed_point(solver, f, z0)
            return iteration.value, iteration.stats
        num_constant = 0
        if self.num_evaluations is not None:
            num_constant = max(0, solver.num_evaluations - self.num_evaluations)
        stats: SolverStats | None = None

        def counted(z: Leaves) -> Leaves:
            if stats is not None:  # the backward pass evaluates f again
                stats.backward_nfe = (stats.backward_nfe or 0) + 1
            return f(z)

        def evaluate(z: Leaves) -> Leaves:
            if f.nfe < num_constant:
                with torch.no_grad():
                    return [v.detach() for v in f(z)]
            is_checkpointed = self.checkpoint and not is_transformed()  # `torch.func` has no saved-tensor hooks
            return checkpoint(counted, z, use_reentrant=False, early_stop=False) if is_checkpointed else f(z)

        start = [z.detach() for z in z0] if num_constant else z0
        iteration = iterate_to_fixed_point(solver, evaluate, start)
        stats, value = iteration.stats, iteration.value
        if num_constant and not is_transformed() and any(z.requires_grad for z in z0):
            value = attach([v.detach() for v in value], value, z0, lambda grads: grads)
        return value, stats

    def check(self, solver: AbstractSolver) -> None:
        if self.num_evaluations is not None and solver.has_tolerance:
            raise ValueError(
                f"num_evaluations={self.num_evaluations} needs a solver without a tolerance, got {solver}: which"
                " evaluation is the last would not be known. Set rtol=0 and atol=0, or use PhantomAdjoint"
            )
