"""Comparisons with the authors' code and torchdeq."""
