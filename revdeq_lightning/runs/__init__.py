"""A run's folder, environment, signals, lock, divergence guard, and random state."""
