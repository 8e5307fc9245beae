"""Data modules for text, images and puzzles, in a reproducible and resumable order."""
