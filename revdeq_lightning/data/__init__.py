"""Data: text as windows of tokens, in a reproducible and resumable order; one DataModule family a file.

Nothing is imported here: a tokenizer is to be had without Lightning.
"""
