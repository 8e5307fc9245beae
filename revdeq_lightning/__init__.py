"""Reversible deep equilibrium models with PyTorch Lightning.

The core is importable from here: `from revdeq_lightning import EquilibriumLayer, MomentumSolver`. Data modules, models,
tasks, callbacks and loggers are importable from their folders: `from revdeq_lightning.tasks import ClassificationTask`.
"""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from revdeq_lightning.equilibrium import (
        AbstractAdjoint as AbstractAdjoint,
        AbstractSolver as AbstractSolver,
        AndersonSolver as AndersonSolver,
        BackpropAdjoint as BackpropAdjoint,
        BroydenSolver as BroydenSolver,
        ConvergenceError as ConvergenceError,
        ConvergenceWarning as ConvergenceWarning,
        DivergenceError as DivergenceError,
        EquilibriumLayer as EquilibriumLayer,
        FixedPointSolution as FixedPointSolution,
        GradientComparison as GradientComparison,
        ImplicitAdjoint as ImplicitAdjoint,
        MomentumSolver as MomentumSolver,
        PhantomAdjoint as PhantomAdjoint,
        PicardSolver as PicardSolver,
        ReconstructionError as ReconstructionError,
        ReconstructionWarning as ReconstructionWarning,
        RelaxedSolver as RelaxedSolver,
        ReversibleAdjoint as ReversibleAdjoint,
        ReversibleSolver as ReversibleSolver,
        SolverStats as SolverStats,
        check_later as check_later,
        deferred_divergence as deferred_divergence,
        equilibria as equilibria,
        gradient_error as gradient_error,
        jacobian_regularization as jacobian_regularization,
        normalize_weights as normalize_weights,
        recorded_residuals as recorded_residuals,
        settle_checks as settle_checks,
        solve_fixed_point as solve_fixed_point,
        solve_in_parts as solve_in_parts,
        spectral_radius as spectral_radius,
    )

# Lazily, so that `revdeq --help` does not wait for PyTorch.
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
