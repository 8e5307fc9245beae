"""A puzzle."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Puzzle(NamedTuple):
    """Symbols of the cells, and the answer in each; int64 arrays of one shape, `(length,)` or `(height, width)`."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
