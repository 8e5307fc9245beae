"""Checkpoint files, sharded checkpoint folders, and the callbacks that write them."""
