"""Solvers: one file each."""

from .base import AbstractSolver, DivergenceError
from .picard import PicardSolver
from .relaxed import RelaxedSolver
from .reversible import AbstractTwoStepSolver, MomentumSolver, ReversibleSolver

__all__ = [
    "AbstractSolver",
    "AbstractTwoStepSolver",
    "DivergenceError",
    "MomentumSolver",
    "PicardSolver",
    "RelaxedSolver",
    "ReversibleSolver",
]
