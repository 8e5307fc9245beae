"""Benchmarks of runs: faults, scaling, and the cost of callbacks."""
