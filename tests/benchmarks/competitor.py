"""A competitor for `benchmarks.isolated`, without anything that takes long to import."""

import os


class Competitor:
    def __init__(self, num_bytes):
        self.num_bytes = num_bytes

    def step(self):
        block = bytearray(os.urandom(1)) * self.num_bytes
        assert block

    def results(self):
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
        return self.num_bytes, len(cores), os.environ["OMP_NUM_THREADS"], os.environ.get("EXTRA")


def build(num_bytes):
    if num_bytes < 0:
        raise ValueError(f"{num_bytes} bytes")
    return Competitor(num_bytes)
