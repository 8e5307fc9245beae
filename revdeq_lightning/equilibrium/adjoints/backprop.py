"""Back-propagation through time: autograd through every iterate of the solver, or through the last ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..function import EquilibriumFunction
from ..loop import Evaluation, iterate_to_fixed_point
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

    def solve(
        self, f: EquilibriumFunction, z0: Leaves, x: Sequence[Any], solver: AbstractSolver
    ) -> tuple[Leaves, SolverStats]:
        num_constant = 0
        if self.num_evaluations is not None:
            num_constant = max(0, solver.max_steps * solver.evaluations_per_step - self.num_evaluations)
        if not torch.is_grad_enabled():
            iteration = iterate_to_fixed_point(solver, f, z0, x)
            return iteration.value, iteration.stats
        checkpointed = _Checkpointed(f)
        evaluation = _Truncated(checkpointed if self.checkpoint else f, num_constant)
        start = [z.detach() for z in z0] if num_constant else z0
        iteration = iterate_to_fixed_point(solver, evaluation, start, x)
        checkpointed.stats = iteration.stats
        if num_constant and any(z.requires_grad for z in z0):
            return attach([v.detach() for v in iteration.value], iteration.value, z0, lambda g: g), iteration.stats
        return iteration.value, iteration.stats

    def check(self, solver: AbstractSolver) -> None:
        if self.num_evaluations is not None and solver.has_tolerance:
            raise ValueError(
                f"num_evaluations={self.num_evaluations} needs a solver without a tolerance, got {solver}: which"
                " evaluation is the last would not be known. Set rtol=0 and atol=0, or use PhantomAdjoint"
            )


class _Truncated:
    """Calls f without recording, the first `num_constant` times."""

    def __init__(self, f: Evaluation, num_constant: int) -> None:
        self.f = f
        self.num_constant = num_constant

    @property
    def nfe(self) -> int:
        return self.f.nfe

    def __call__(self, z: Leaves, x: Sequence[Any]) -> Leaves:
        with torch.set_grad_enabled(self.nfe >= self.num_constant):
            return self.f(z, x)


class _Checkpointed:
    """Calls f under a checkpoint, and counts the calls that the backward pass makes."""

    def __init__(self, f: EquilibriumFunction) -> None:
        self.f = f
        self.stats: SolverStats | None = None

    @property
    def nfe(self) -> int:
        return self.f.nfe

    def __call__(self, z: Leaves, x: Sequence[Any]) -> Leaves:
        return checkpoint(self._evaluate, z, x, use_reentrant=False)

    def _evaluate(self, z: Leaves, x: Sequence[Any]) -> Leaves:
        if self.stats is not None:
            self.stats.backward_nfe = (self.stats.backward_nfe or 0) + 1
        return self.f(z, x)
