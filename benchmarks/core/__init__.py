"""The core: exactness, convergence, cost and memory."""
