"""Reversible deep equilibrium models with PyTorch Lightning."""

__version__ = "0.1.0.dev0"
