"""How many puzzles a reasoner solves, and how many evaluations of f it takes.

loss          nats per cell
cell_accuracy fraction of the cells that are right
solved        fraction of the puzzles in which every cell is right
evaluations   mean evaluations of f per puzzle
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

SUMS = ("nats", "right_cells", "cells", "solved", "evaluations", "puzzles")


class ReasoningMetrics(Metric):
    """Sums over a split, in float64 and over all processes.

    Keys: `loss`, `cell_accuracy`, `solved`, `evaluations`. Assumes that each puzzle is seen once.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(SUMS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **sums: Tensor) -> None:
        """Add the sums over a batch, by the names in `SUMS`."""
        self.sums += torch.stack([sums[name].to(self.sums) for name in SUMS])

    def compute(self) -> dict[str, Tensor]:
        """The figures; NaN where there was no puzzle."""
        nats, right_cells, cells, solved, evaluations, puzzles = (total.float() for total in self.sums)
        return {
            "loss": nats / cells,
            "cell_accuracy": right_cells / cells,
            "solved": solved / puzzles,
            "evaluations": evaluations / puzzles,
        }
