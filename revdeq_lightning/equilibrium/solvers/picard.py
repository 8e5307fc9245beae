"""Plain fixed-point iteration: z_{n+1} = f(z_n, x). Not reversible."""

from dataclasses import dataclass

from ..norms import Leaves, Mask, select
from .base import AbstractSolver


@dataclass(frozen=True, kw_only=True)
class PicardSolver(AbstractSolver):
    """`z_{n+1} = f(z_n, x)`, 1 evaluation of f a step."""

    def advance(self, state: Leaves, value: Leaves, active: Mask) -> Leaves:
        return select(active, value, state)
