"""Deep equilibrium layers in plain PyTorch, reversible bit for bit.

    solution = solve_fixed_point(f, z0, x, solver=ReversibleSolver(beta=0.8, max_steps=8), adjoint=ReversibleAdjoint())

`solvers/` holds the iterations, `adjoints/` the rules for the gradient, `arithmetic.py` what makes reversal exact.
"""

from .adjoints import AbstractAdjoint, BackpropAdjoint, ReconstructionError, ReconstructionWarning, ReversibleAdjoint
from .layer import EquilibriumLayer
from .solution import FixedPointSolution, SolverStats
from .solve import solve_fixed_point
from .solvers import (
    AbstractSolver,
    DivergenceError,
    MomentumSolver,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
)

__all__ = [
    "AbstractAdjoint",
    "AbstractSolver",
    "BackpropAdjoint",
    "DivergenceError",
    "EquilibriumLayer",
    "FixedPointSolution",
    "MomentumSolver",
    "PicardSolver",
    "ReconstructionError",
    "ReconstructionWarning",
    "RelaxedSolver",
    "ReversibleAdjoint",
    "ReversibleSolver",
    "SolverStats",
    "solve_fixed_point",
]
