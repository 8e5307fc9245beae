"""Reversible deep equilibrium models with PyTorch Lightning.

The core is importable from here: `from revdeq_lightning import EquilibriumLayer, MomentumSolver`. Tasks, data modules,
callbacks and loggers are importable from their folders.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from revdeq_lightning.equilibrium import (
        AbstractAdjoint,
        AbstractSolver,
        AndersonSolver,
        BackpropAdjoint,
        BroydenSolver,
        ConvergenceError,
        ConvergenceWarning,
        DivergenceError,
        EquilibriumLayer,
        FixedPointSolution,
        GradientError,
        ImplicitAdjoint,
        MomentumSolver,
        PhantomAdjoint,
        PicardSolver,
        ReconstructionError,
        ReconstructionWarning,
        RelaxedSolver,
        ReversibleAdjoint,
        ReversibleSolver,
        SolverStats,
        deferred_divergence,
        equilibria,
        gradient_error,
        jacobian_regularisation,
        normalise_weights,
        recorded_residuals,
        solve_fixed_point,
        solve_in_parts,
        spectral_radius,
    )

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


def __getattr__(name: str) -> Any:  # so that `revdeq --help` does not wait for PyTorch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from revdeq_lightning import equilibrium

    return getattr(equilibrium, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
