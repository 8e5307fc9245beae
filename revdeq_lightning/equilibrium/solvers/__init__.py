"""Solvers, one file each, and `SOLVERS`, their registry: a new solver is a file and a line in it."""

from .anderson import AndersonSolver
from .base import AbstractSolver
from .broyden import BroydenSolver
from .picard import PicardSolver
from .relaxed import RelaxedSolver
from .reversible import MomentumSolver, ReversibleSolver

SOLVERS: dict[str, type[AbstractSolver]] = {
    "momentum": MomentumSolver,
    "reversible": ReversibleSolver,
    "relaxed": RelaxedSolver,
    "picard": PicardSolver,
    "anderson": AndersonSolver,
    "broyden": BroydenSolver,
}
"""By name in a configuration. Their options, types, errors and help are derived from these classes."""
