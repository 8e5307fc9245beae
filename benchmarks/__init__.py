"""Measurements of what the project claims; `README.md` says what they mean."""
