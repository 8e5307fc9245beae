"""Exact state arithmetic: updates, remainders, kernels."""
