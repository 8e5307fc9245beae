"""Benchmarks of the core: exactness, convergence, cost, and memory."""
