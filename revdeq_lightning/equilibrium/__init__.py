"""Deep equilibrium layers in plain PyTorch, reversible bit for bit.

    solution = solve_fixed_point(f, z0, x, solver=ReversibleSolver(beta=0.8, max_steps=8), adjoint=ReversibleAdjoint())

`solve.py` is the entry point, `loop.py` evaluates f, `solvers/` holds the iterations, `adjoints/` the rules for the
gradient, and `exact/` the arithmetic that makes reversal exact.
"""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.equilibrium.adjoints import (
        AbstractAdjoint as AbstractAdjoint,
        BackpropAdjoint as BackpropAdjoint,
        ConvergenceError as ConvergenceError,
        ConvergenceWarning as ConvergenceWarning,
        ImplicitAdjoint as ImplicitAdjoint,
        PhantomAdjoint as PhantomAdjoint,
        ReconstructionError as ReconstructionError,
        ReconstructionWarning as ReconstructionWarning,
        ReversibleAdjoint as ReversibleAdjoint,
    )
    from revdeq_lightning.equilibrium.diagnostics import (
        GradientComparison as GradientComparison,
        gradient_error as gradient_error,
        jacobian_regularization as jacobian_regularization,
        spectral_radius as spectral_radius,
    )
    from revdeq_lightning.equilibrium.layer import EquilibriumLayer as EquilibriumLayer, equilibria as equilibria
    from revdeq_lightning.equilibrium.loop import (
        DivergenceError as DivergenceError,
        deferred_divergence as deferred_divergence,
        recorded_residuals as recorded_residuals,
    )
    from revdeq_lightning.equilibrium.parts import solve_in_parts as solve_in_parts
    from revdeq_lightning.equilibrium.solution import (
        FixedPointSolution as FixedPointSolution,
        SolverStats as SolverStats,
    )
    from revdeq_lightning.equilibrium.solve import solve_fixed_point as solve_fixed_point
    from revdeq_lightning.equilibrium.solvers import (
        AbstractSolver as AbstractSolver,
        AndersonSolver as AndersonSolver,
        BroydenSolver as BroydenSolver,
        MomentumSolver as MomentumSolver,
        PicardSolver as PicardSolver,
        RelaxedSolver as RelaxedSolver,
        ReversibleSolver as ReversibleSolver,
    )
    from revdeq_lightning.equilibrium.weights import normalize_weights as normalize_weights

# Lazily, so that `validation.py` does not wait for PyTorch.
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
