"""Random numbers of the host: raw bits of a generator, the one stream that NumPy promises never to change."""

import numpy as np
from numpy.typing import NDArray


class Draws:
    """Random numbers, a pure function of a key of integers, not negative, with any version of NumPy."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def integers(self, below: int, count: int) -> NDArray[np.int64]:
        """`count` integers from 0 to `below - 1`."""
        return (self._bits.random_raw(count) % np.uint64(below)).astype(np.int64)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` numbers in (0, 1)."""
        return ((self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A permutation of `0 ... count - 1`."""
        return np.argsort(self._bits.random_raw(count), kind="stable")


def shuffled_keys(num_items: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of the items, plus `epoch * num_items`: keys differ between epochs."""
    return epoch * num_items + Draws(seed, epoch).permutation(num_items)
