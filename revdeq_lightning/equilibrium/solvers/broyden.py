"""Broyden's method: quasi-Newton on g(z) = f(z, x) - z, its inverse Jacobian learned on the way. Not reversible.

    z_{n+1} = z_n - B_n g_n,       B_0 = -beta * I
    B_{n+1} = B_n + u v^T,         v = B_n^T dz,   u = (dz - B_n dg) / (v^T dg)

so that B_{n+1} dg = dz for the newest move (dz, dg). B is kept as `memory` pairs (u, v) at most, then started again.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..norms import Leaves, Mask, inner, join, rounding, select, split, weighted_sum
from ..validation import require_count, require_in_range
from .base import AbstractSolver

SUFFICIENT_DECREASE = 1e-4
"""Share of the hoped-for decrease of the residual's norm that a step must bring, with a line search."""


class BroydenState(NamedTuple):
    """The iterate at which f is evaluated next, the best one so far it started from, and the inverse Jacobian."""

    iterate: Leaves
    base: Tensor  # where the newest step starts, as are the next three `(batch, elements)`
    residual: Tensor | None  # g there; None before the first evaluation
    direction: Tensor  # -B g there
    length: Tensor  # share of the direction that the newest step goes, `(batch,)`
    pairs: list[tuple[Tensor, Tensor]]  # (u, v), oldest first


@dataclass(frozen=True, kw_only=True)
class BroydenSolver(AbstractSolver):
    """Quasi-Newton steps with a limited memory, each sample for itself, 1 evaluation of f a step.

    It stores `2 * memory + 4` states. A full step need not come nearer. Without the line search the method runs away
    where f has no fixed point: on an untrained pre-norm transformer block to states of 1e4, whose relative residual is
    small because they are large, so that every sample counted as converged. With the line search it misses some fixed
    points of expanding maps, which are reached only through larger residuals. `AndersonSolver` is the safer choice.

    Args:
        memory: Pairs (u, v) that the inverse Jacobian keeps; when it is full, it starts again.
        beta: Weight of the first step's evaluation, B_0 = -beta * I, in (0, 2).
        max_halvings: Line search: how often a step is halved while it does not lower the norm of f(z) - z; the last
            half is taken in any case. Every trial is a step with its evaluation and takes a place in the memory. 0: no
            line search; below 5 it did not stop the runaway above in all samples.

    Source: Broyden 1965 (the "good" update, by the Sherman-Morrison formula); for equilibrium models Bai et al. 2019,
    arXiv:1909.01377.
    """

    memory: int = 16
    beta: float = 1.0
    max_halvings: int = 6

    default_adjoint = "implicit"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("memory", self.memory)
        require_count("max_halvings", self.max_halvings, at_least=0)
        require_in_range("beta", self.beta, "(0, 2)")

    def init(self, z0: Leaves, *, reversible: bool) -> BroydenState:
        base = join(z0)
        return BroydenState(list(z0), base, None, base, base.new_ones(base.shape[0]), [])

    def iterate(self, state: BroydenState) -> Leaves:
        return state.iterate

    def advance(self, state: BroydenState, value: Leaves, active: Mask) -> BroydenState:
        z = join(state.iterate)
        g = join(value) - z
        length = torch.ones_like(state.length)
        pairs = state.pairs
        if state.residual is None:
            direction = self.beta * g
        else:
            accepted = self._is_accepted(state.length, g, state.residual)
            # A refused trial is as if it had not been made: no move, and the same direction, half as far.
            z, g = torch.where(accepted, z, state.base), torch.where(accepted, g, state.residual)
            length = torch.where(accepted[:, 0], length, state.length / 2)
            # Each pair was made for the sum of those before it: without the oldest one the rest is no inverse Jacobian.
            # So affine maps with norm 0.95 and a memory of 8 were not solved in 150 steps; with restarts they took 40.
            pairs = [] if len(pairs) == self.memory else pairs
            pair, direction = self._updated(pairs, z - state.base, g - state.residual, g, rounding(value))
            pairs = [*pairs, pair]
            direction = torch.where(accepted, direction, state.direction)
        iterate = split(torch.addcmul(z, direction, length[:, None]), value)
        return BroydenState(select(active, iterate, state.iterate), z, g, direction, length, pairs)

    @torch.no_grad()
    def _is_accepted(self, length: Tensor, g: Tensor, g_before: Tensor) -> Tensor:
        """Whether each sample's step is taken, `(batch, 1)`; without a line search the shortest length is 1."""
        norm, before = (torch.linalg.vector_norm(r, dim=1) for r in (g, g_before))
        # A residual that is not finite is let through, so that it is reported and not searched around.
        is_unavoidable = (length <= 2.0**-self.max_halvings) | ~norm.isfinite()
        is_accepted: Tensor = (norm <= (1 - SUFFICIENT_DECREASE * length) * before) | is_unavoidable
        return is_accepted[:, None]

    def _updated(
        self, pairs: list[tuple[Tensor, Tensor]], dz: Tensor, dg: Tensor, g: Tensor, noise: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The new pair (u, v), zeros where the move says nothing, and the new direction `-B g`."""
        v = self._apply([(v, u) for u, v in pairs], dz)
        u = dz - self._apply(pairs, dg)
        slope = inner(v, dg)
        with torch.no_grad():  # within rounding, or without a move, nothing can be learned
            v_norm, dg_norm = (torch.linalg.vector_norm(vector, dim=1) for vector in (v, dg))
            is_informative = (dg_norm > noise) & (slope.abs() > torch.finfo(g.dtype).eps * v_norm * dg_norm)
        u = u * torch.where(is_informative, 1 / torch.where(is_informative, slope, 1.0), 0.0)[:, None]
        return (u, v), torch.addcmul(-self._apply(pairs, g), u, -inner(v, g)[:, None])

    def _apply(self, pairs: list[tuple[Tensor, Tensor]], vector: Tensor) -> Tensor:
        """`B vector`, with the pairs swapped `B^T vector`."""
        weights = [torch.full_like(vector[:, 0], -self.beta), *(inner(v, vector) for _, v in pairs)]
        return weighted_sum([vector, *(u for u, _ in pairs)], weights)
