"""Adjoints, the rules for the gradient, one file each, and `ADJOINTS`, their registry."""

from .backprop import BackpropAdjoint as BackpropAdjoint
from .base import AbstractAdjoint as AbstractAdjoint
from .implicit import (
    ConvergenceError as ConvergenceError,
    ConvergenceWarning as ConvergenceWarning,
    ImplicitAdjoint as ImplicitAdjoint,
)
from .phantom import PhantomAdjoint as PhantomAdjoint
from .reversible import (
    ReconstructionError as ReconstructionError,
    ReconstructionWarning as ReconstructionWarning,
    ReversibleAdjoint as ReversibleAdjoint,
)

ADJOINTS: dict[str, type[AbstractAdjoint]] = {
    "reversible": ReversibleAdjoint,
    "backprop": BackpropAdjoint,
    "implicit": ImplicitAdjoint,
    "phantom": PhantomAdjoint,
}
"""By name in a configuration, as `solvers.SOLVERS`."""
