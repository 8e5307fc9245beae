"""An equilibrium as a layer: f, solver and adjoint."""

from typing import Any

import torch
from torch import Tensor, nn

from .adjoints.base import AbstractAdjoint
from .adjoints.reversible import ReversibleAdjoint
from .solution import FixedPointSolution
from .solve import solve_fixed_point
from .solvers.base import AbstractSolver


class EquilibriumLayer(nn.Module):
    """`z = f(z, x)` as a module; for FSDP2 it is the unit to shard, never f alone.

    Args:
        f: Map `(z, x) -> z`, see `solve_fixed_point`.
        solver: Iteration and stopping rule.
        adjoint: Gradient rule; `ReversibleAdjoint()` by default.
    """

    def __init__(self, f: nn.Module, *, solver: AbstractSolver, adjoint: AbstractAdjoint | None = None) -> None:
        super().__init__()
        self.f = f
        self.solver = solver
        self.adjoint = ReversibleAdjoint() if adjoint is None else adjoint

    def forward(self, x: Any, z0: Any = None) -> FixedPointSolution:
        """Solve for the fixed point.

        Args:
            x: Injected input, a pytree of tensors.
            z0: Initial state; zeros in the shape and dtype of x by default, which must then be a tensor. For a warm
                start give the detached value of an earlier solution.

        Returns:
            See `solve_fixed_point`.
        """
        if z0 is None:
            if not isinstance(x, Tensor):
                raise ValueError(f"z0 is needed where x is not a single tensor, got x of type {type(x).__name__}")
            z0 = torch.zeros_like(x)
        return solve_fixed_point(self.f, z0, x, solver=self.solver, adjoint=self.adjoint)

    def extra_repr(self) -> str:
        """Solver and adjoint, for `print(layer)`."""
        return f"solver={self.solver}, adjoint={self.adjoint}"
