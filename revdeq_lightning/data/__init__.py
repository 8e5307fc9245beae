"""Data: windows of text and augmented images, in a reproducible and resumable order; one DataModule family a file.

Nothing is imported here: a tokenizer is to be had without Lightning.
"""
