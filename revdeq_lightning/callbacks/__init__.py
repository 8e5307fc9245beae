"""Callbacks, one a file: what a run shows, keeps and resumes."""
