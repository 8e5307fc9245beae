"""Back-propagation through time: autograd through every iterate of the solver."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..function import EquilibriumFunction, Leaves
from ..solution import SolverStats
from ..solvers.base import AbstractSolver, iterate_to_fixed_point
from .base import AbstractAdjoint


@dataclass(frozen=True, kw_only=True)
class BackpropAdjoint(AbstractAdjoint):
    """The exact gradient of the iteration with any solver, the reversible adjoint's twin; memory linear in evaluations.

    Args:
        checkpoint: Store only the iterates and evaluate f once more in the backward pass: less memory (still linear in
            the evaluations), a third more time.
    """

    checkpoint: bool = False

    def solve(
        self, f: EquilibriumFunction, z0: Leaves, x: Sequence[Any], solver: AbstractSolver
    ) -> tuple[Leaves, SolverStats]:
        if not (self.checkpoint and torch.is_grad_enabled()):
            iteration = iterate_to_fixed_point(solver, f, z0, x)
            return iteration.value, iteration.stats
        checkpointed = _Checkpointed(f)
        iteration = iterate_to_fixed_point(solver, checkpointed, z0, x)
        checkpointed.stats = iteration.stats
        return iteration.value, iteration.stats


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
