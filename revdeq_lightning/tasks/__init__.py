"""Tasks: models with their losses and optimizers."""
