"""An equilibrium as a layer: f, solver and adjoint."""

import dataclasses
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .adjoints.base import AbstractAdjoint
from .adjoints.reversible import ReversibleAdjoint
from .norms import Map
from .solution import FixedPointSolution
from .solve import require_solver_and_adjoint, solve_in_parts
from .solvers.base import AbstractSolver
from .validation import require_count


class EquilibriumLayer(nn.Module):
    """`z = f(z, x)` as a module; for FSDP2 it is the unit to shard, never f alone.

    Args:
        f: Map `(z, x) -> z`, see `solve_fixed_point`.
        solver: Iteration and stopping rule.
        adjoint: Gradient rule; `ReversibleAdjoint()` by default.
        num_parts: Parts of the solve, each with a result in `solution.earlier` to take a loss on: see `solve_in_parts`.
    """

    def __init__(
        self, f: nn.Module, *, solver: AbstractSolver, adjoint: AbstractAdjoint | None = None, num_parts: int = 1
    ) -> None:
        super().__init__()
        adjoint = ReversibleAdjoint() if adjoint is None else adjoint
        require_solver_and_adjoint(solver, adjoint)
        require_count("num_parts", num_parts)
        if num_parts > solver.max_steps:
            raise ValueError(f"num_parts must be at most the solver's max_steps, {solver.max_steps}, got {num_parts}")
        self.f = f
        self.solver = solver
        self.adjoint = adjoint
        self.num_parts = num_parts

    def forward(self, x: Any, z0: Any = None, **changes: Any) -> FixedPointSolution:
        """Solve for the fixed point of `f(., x)`.

        Args:
            x: Injected input.
            z0: Initial state; None: zeros like the tensor x. With a tolerance, the last call's value may save steps.
            changes: Settings of the solver in this call, such as `max_steps=256` where problems are larger.
        """
        if z0 is None:
            if not isinstance(x, Tensor):
                advice = (
                    ": make EquilibriumLayer a leaf of the torch.fx.Tracer" if isinstance(x, torch.fx.Proxy) else ""
                )
                raise ValueError(f"z0 is needed where x is not a tensor, got x of type {type(x).__name__}{advice}")
            z0 = torch.zeros_like(x)
        return self.solve(self.f, z0, x, adjoint=self.adjoint, **changes)

    def solve(self, f: Map, z0: Any, x: Any, *, adjoint: AbstractAdjoint, **changes: Any) -> FixedPointSolution:
        """The same solve with another map or adjoint in place of its own."""
        solver = dataclasses.replace(self.solver, **changes) if changes else self.solver
        return solve_in_parts(f, z0, x, solver=solver, adjoint=adjoint, num_parts=self.num_parts)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("EquilibriumLayer is not a program of torch.jit.script: use torch.jit.trace or torch.export")

    def extra_repr(self) -> str:
        parts = f", num_parts={self.num_parts}" if self.num_parts > 1 else ""
        return f"solver={self.solver}, adjoint={self.adjoint}{parts}"


def equilibria(module: nn.Module) -> list[EquilibriumLayer]:
    """The equilibrium layers of a module, in order."""
    return [m for m in module.modules() if isinstance(m, EquilibriumLayer)]
