"""What every adjoint shares."""

import abc
from collections.abc import Sequence
from typing import Any

from ..function import EquilibriumFunction
from ..norms import Leaves
from ..solution import SolverStats
from ..solvers.base import AbstractSolver


class AbstractAdjoint(abc.ABC):
    """A rule for the gradient of a solve: it runs the solver's loop and makes the result differentiable."""

    @abc.abstractmethod
    def solve(
        self, f: EquilibriumFunction, z0: Leaves, x: Sequence[Any], solver: AbstractSolver
    ) -> tuple[Leaves, SolverStats]:
        """Run `solver` on f from `z0`, differentiable in z0, x and the parameters of f."""

    def check(self, solver: AbstractSolver) -> None:  # noqa: B027
        """Raise ValueError if this adjoint does not support the solver."""
