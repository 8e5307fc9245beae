"""Measurements behind the claims of the project; `README.md` interprets them."""
