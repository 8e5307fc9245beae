"""Deep equilibrium layers in plain PyTorch, reversible bit for bit.

    solution = solve_fixed_point(f, z0, x, solver=ReversibleSolver(beta=0.8, max_steps=8), adjoint=ReversibleAdjoint())

`solvers/` holds the iterations, `adjoints/` the rules for the gradient, `arithmetic.py` what makes reversal exact.
"""

from .adjoints import (
    AbstractAdjoint,
    BackpropAdjoint,
    ConvergenceError,
    ConvergenceWarning,
    ImplicitAdjoint,
    PhantomAdjoint,
    ReconstructionError,
    ReconstructionWarning,
    ReversibleAdjoint,
)
from .diagnostics import GradientError, gradient_error, jacobian_regularisation, spectral_radius
from .layer import EquilibriumLayer, equilibria
from .loop import DivergenceError, deferred_divergence, recorded_residuals
from .parts import solve_in_parts
from .solution import FixedPointSolution, SolverStats
from .solve import solve_fixed_point
from .solvers import (
    AbstractSolver,
    AndersonSolver,
    BroydenSolver,
    MomentumSolver,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
)
from .weights import normalise_weights

__all__ = [
    "AbstractAdjoint",
    "AbstractSolver",
    "AndersonSolver",
    "BackpropAdjoint",
    "BroydenSolver",
    "ConvergenceError",
    "ConvergenceWarning",
    "DivergenceError",
    "EquilibriumLayer",
    "FixedPointSolution",
    "GradientError",
    "ImplicitAdjoint",
    "MomentumSolver",
    "PhantomAdjoint",
    "PicardSolver",
    "ReconstructionError",
    "ReconstructionWarning",
    "RelaxedSolver",
    "ReversibleAdjoint",
    "ReversibleSolver",
    "SolverStats",
    "deferred_divergence",
    "equilibria",
    "gradient_error",
    "jacobian_regularisation",
    "normalise_weights",
    "recorded_residuals",
    "solve_fixed_point",
    "solve_in_parts",
    "spectral_radius",
]
