"""Solvers, one file each, and `SOLVERS`, their registry: a new solver is a file and a line in it."""

from .anderson import AndersonSolver as AndersonSolver
from .base import AbstractSolver as AbstractSolver
from .broyden import BroydenSolver as BroydenSolver
from .picard import PicardSolver as PicardSolver
from .relaxed import RelaxedSolver as RelaxedSolver
from .reversible import (
    AbstractTwoStepSolver as AbstractTwoStepSolver,
    MomentumSolver as MomentumSolver,
    ReversibleSolver as ReversibleSolver,
)

SOLVERS: dict[str, type[AbstractSolver]] = {
    "momentum": MomentumSolver,
    "reversible": ReversibleSolver,
    "relaxed": RelaxedSolver,
    "picard": PicardSolver,
    "anderson": AndersonSolver,
    "broyden": BroydenSolver,
}
"""By name in a configuration. Their options, types, errors and help are derived from these classes."""
