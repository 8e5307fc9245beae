"""Relaxed fixed-point iteration: z_{n+1} = (1 - beta) * z_n + beta * f(z_n, x). Not reversible in this form."""

from dataclasses import dataclass

from ..norms import Leaves, Mask, select
from ..validation import require_in_range
from .base import AbstractSolver


@dataclass(frozen=True, kw_only=True)
class RelaxedSolver(AbstractSolver):
    """`z_{n+1} = (1 - beta) * z_n + beta * f(z_n, x)`, 1 evaluation of f a step.

    Args:
        beta: Relaxation parameter, the weight of the new evaluation, in (0, 2).
    """

    beta: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in_range("beta", self.beta, "(0, 2)")

    def advance(self, state: Leaves, value: Leaves, active: Mask) -> Leaves:
        relaxed = [(1 - self.beta) * z + self.beta * f for z, f in zip(state, value, strict=True)]
        return select(active, relaxed, state)
