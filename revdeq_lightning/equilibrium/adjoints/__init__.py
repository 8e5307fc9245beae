"""Adjoints, the rules for the gradient, one file each, and `ADJOINTS`, their registry."""

from .backprop import BackpropAdjoint
from .base import AbstractAdjoint
from .implicit import ImplicitAdjoint
from .phantom import PhantomAdjoint
from .reversible import ReversibleAdjoint

ADJOINTS: dict[str, type[AbstractAdjoint]] = {
    "reversible": ReversibleAdjoint,
    "backprop": BackpropAdjoint,
    "implicit": ImplicitAdjoint,
    "phantom": PhantomAdjoint,
}
"""By name in a configuration, as `solvers.SOLVERS`."""
