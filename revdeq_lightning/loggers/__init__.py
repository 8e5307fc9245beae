"""What records a run: CSV, W&B, progress, media."""
