"""Metrics of classifiers and reasoners: figures of the sums over a split, in which every item must be seen once."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class AbstractSums(Metric):
    """Sums over a split, in float64 and over all processes."""

    names: ClassVar[tuple[str, ...]]
    is_differentiable = False
    full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **sums: Tensor) -> None:
        """Add the sums over a batch, by `names`."""
        self.sums += torch.stack([sums[name].to(self.sums) for name in self.names])

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The figures; NaN if nothing was added."""


class ClassificationMetrics(AbstractSums):
    """Keys: `loss` (nats per image), `accuracy` and, with more than 5 classes, `top5_accuracy`."""

    names = ("nats", "right", "right_in_five", "images")

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def compute(self) -> dict[str, Tensor]:
        """The figures."""
        nats, right, right_in_five, images = self.sums.float()
        figures = {"loss": nats / images, "accuracy": right / images}
        return figures | ({"top5_accuracy": right_in_five / images} if self.num_classes > 5 else {})


class ReasoningMetrics(AbstractSums):
    """Keys: `loss` (nats per cell), `cell_accuracy`, `solved` (fraction with every cell right), `evaluations` of f."""

    names = ("nats", "right_cells", "cells", "solved", "evaluations", "puzzles")

    def compute(self) -> dict[str, Tensor]:
        """The figures."""
        nats, right, cells, solved, evaluations, puzzles = self.sums.float()
        per_puzzle = {"solved": solved / puzzles, "evaluations": evaluations / puzzles}
        return {"loss": nats / cells, "cell_accuracy": right / cells} | per_puzzle
