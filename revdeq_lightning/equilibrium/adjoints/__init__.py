"""Adjoints, the rules for the gradient: one file each."""

from .backprop import BackpropAdjoint
from .base import AbstractAdjoint
from .reversible import ReconstructionError, ReconstructionWarning, ReversibleAdjoint

__all__ = ["AbstractAdjoint", "BackpropAdjoint", "ReconstructionError", "ReconstructionWarning", "ReversibleAdjoint"]
