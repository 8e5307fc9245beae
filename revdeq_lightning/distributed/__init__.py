"""Strategies for several devices, and how models are sharded."""
