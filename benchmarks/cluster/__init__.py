"""Runs: faults, scaling, and what callbacks cost."""
