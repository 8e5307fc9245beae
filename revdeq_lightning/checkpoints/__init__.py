"""Checkpoints: files, input and output, sharded folders, and the callbacks that write them."""
