"""Solvers: one file each."""

from .anderson import AndersonSolver
from .base import AbstractSolver
from .broyden import BroydenSolver
from .picard import PicardSolver
from .relaxed import RelaxedSolver
from .reversible import AbstractTwoStepSolver, MomentumSolver, ReversibleSolver

__all__ = [
    "AbstractSolver",
    "AbstractTwoStepSolver",
    "AndersonSolver",
    "BroydenSolver",
    "MomentumSolver",
    "PicardSolver",
    "RelaxedSolver",
    "ReversibleSolver",
]
