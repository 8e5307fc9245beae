"""Deep equilibrium layers in plain PyTorch, reversible bit for bit.

    solution = solve_fixed_point(f, z0, x, solver=ReversibleSolver(beta=0.8, max_steps=8), adjoint=ReversibleAdjoint())

`solve.py` is the entry point, `loop.py` evaluates f, `solvers/` holds the iterations, `adjoints/` the rules for the
gradient, and `exact/` the arithmetic that makes reversal exact.
"""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.errors import DivergenceError as DivergenceError

    from .adjoints.backprop import BackpropAdjoint as BackpropAdjoint
    from .adjoints.base import AbstractAdjoint as AbstractAdjoint
    from .adjoints.implicit import (
        ConvergenceError as ConvergenceError,
        ConvergenceWarning as ConvergenceWarning,
        ImplicitAdjoint as ImplicitAdjoint,
    )
    from .adjoints.phantom import PhantomAdjoint as PhantomAdjoint
    from .adjoints.reversible import (
        ReconstructionError as ReconstructionError,
        ReconstructionWarning as ReconstructionWarning,
        ReversibleAdjoint as ReversibleAdjoint,
    )
    from .checks import check_later as check_later, settle_checks as settle_checks
    from .diagnostics import (
        GradientComparison as GradientComparison,
        gradient_error as gradient_error,
        jacobian_regularization as jacobian_regularization,
        spectral_radius as spectral_radius,
    )
    from .layer import EquilibriumLayer as EquilibriumLayer, equilibria as equilibria
    from .loop import deferred_divergence as deferred_divergence, recorded_residuals as recorded_residuals
    from .solution import FixedPointSolution as FixedPointSolution, SolverStats as SolverStats
    from .solve import solve_fixed_point as solve_fixed_point, solve_in_parts as solve_in_parts
    from .solvers.anderson import AndersonSolver as AndersonSolver
    from .solvers.base import AbstractSolver as AbstractSolver
    from .solvers.broyden import BroydenSolver as BroydenSolver
    from .solvers.picard import PicardSolver as PicardSolver
    from .solvers.relaxed import RelaxedSolver as RelaxedSolver
    from .solvers.reversible import MomentumSolver as MomentumSolver, ReversibleSolver as ReversibleSolver
    from .weights import normalize_weights as normalize_weights

# Lazily, so that `validation.py` does not wait for PyTorch.
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
