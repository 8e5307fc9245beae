"""Adjoints, the rules for the gradient: one file each."""

from .backprop import BackpropAdjoint
from .base import AbstractAdjoint
from .implicit import ConvergenceError, ConvergenceWarning, ImplicitAdjoint
from .phantom import PhantomAdjoint
from .reversible import ReconstructionError, ReconstructionWarning, ReversibleAdjoint

__all__ = [
    "AbstractAdjoint",
    "BackpropAdjoint",
    "ConvergenceError",
    "ConvergenceWarning",
    "ImplicitAdjoint",
    "PhantomAdjoint",
    "ReconstructionError",
    "ReconstructionWarning",
    "ReversibleAdjoint",
]
