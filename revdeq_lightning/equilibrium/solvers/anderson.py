"""Anderson acceleration: the newest iterates, mixed so that their residuals cancel. Not reversible.

g_i = f(z_i, x) - z_i
alpha = argmin norm(sum_i alpha_i * g_i)^2 + ridge   subject to   sum_i alpha_i = 1
z_{n+1} = sum_i alpha_i * (z_i + beta * g_i)         over the newest memory + 1 iterates
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..norms import Leaves, Mask, inner, join, rounding, select, split, weighted_sum
from ..validation import require_choice, require_count, require_in_range
from .base import AbstractSolver

RidgeScale = Literal["relative", "absolute"]


class AndersonState(NamedTuple):
    """The newest iterate, and the window of those at which f was evaluated, oldest first."""

    iterate: Leaves
    relaxed: list[Tensor]  # z_i + beta * g_i, each `(batch, elements)`
    residuals: list[Tensor]  # g_i, each `(batch, elements)`
    gram: Tensor  # inner products of the residuals, `(batch, window, window)`, float64


@dataclass(frozen=True, kw_only=True)
class AndersonSolver(AbstractSolver):
    """Mixes the newest `memory + 1` iterates so that the mix of their residuals is smallest, 1 evaluation of f a step.

    Each sample has its own weights, shared by all tensors of the state. On affine maps it is GMRES while the memory
    lasts. It stores `2 * (memory + 1)` states.

    Args:
        memory: Earlier iterates that are mixed with the newest one, at least 1.
        beta: Relaxation parameter, the weight of the new evaluations, in (0, 2).
        ridge: Regularization of the least squares, positive: see `ridge_scale`.
        ridge_scale: "relative": `ridge * sum_i alpha_i^2 * norm(g_i)^2` is added to the squares, so that the steps
            depend on no unit and stay accelerated down to rounding. "absolute": `ridge * sum_i alpha_i^2`, as in the
            paper's released code (there 1e-6), where the mix becomes a plain mean once the residual's norm is
            below `sqrt(ridge)`.

    Source: Anderson 1965; Walker and Ni 2011, doi:10.1137/10078356X.
    """

    memory: int = 5
    beta: float = 1.0
    ridge: float = 1e-6
    ridge_scale: RidgeScale = "relative"

    default_adjoint = "implicit"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("memory", self.memory)
        require_in_range("beta", self.beta, "(0, 2)")
        require_in_range("ridge", self.ridge, "(0, inf)", "use 1e-6, for example")
        require_choice("ridge_scale", self.ridge_scale, get_args(RidgeScale))

    def init(self, z0: Leaves, *, reversible: bool) -> AndersonState:
        batch, device = z0[0].shape[0], z0[0].device
        return AndersonState(list(z0), [], [], torch.zeros(batch, 0, 0, dtype=torch.float64, device=device))

    def iterate(self, state: AndersonState) -> Leaves:
        return state.iterate

    def advance(self, state: AndersonState, value: Leaves, active: Mask) -> AndersonState:
        z = join(state.iterate)
        g = join(value) - z
        first = 1 if len(state.residuals) > self.memory else 0
        residuals = [*state.residuals[first:], g]
        relaxed = [*state.relaxed[first:], z + self.beta * g]
        row = torch.stack([inner(r, g) for r in residuals], 1).double()
        gram = torch.cat([state.gram[:, first:, first:], row[:, :-1, None]], 2)
        gram = torch.cat([gram, row[:, None, :]], 1)
        weights = self._weights(gram, rounding(value).double() ** 2).to(g.dtype)
        iterate = split(weighted_sum(relaxed, weights.unbind(1)), value)
        return AndersonState(select(active, iterate, state.iterate), relaxed, residuals, gram)

    def _weights(self, gram: Tensor, noise: Tensor) -> Tensor:
        """alpha, `(batch, window)`: the solution of `(G^T G + ridge) alpha = 1`, scaled to the sum 1."""
        squares = gram.diagonal(dim1=1, dim2=2)
        ridge = self.ridge * (squares if self.ridge_scale == "relative" else torch.ones_like(squares))
        # Fitted to rounding errors the weights would be random, and so would be the gradient through them.
        ridge = ridge + noise[:, None]
        # The window is taken to begin full of copies of z0 (so does the released code): they share its weight.
        copies = max(1, self.memory + 2 - squares.shape[1])
        ridge = torch.cat([ridge[:, :1] / copies, ridge[:, 1:]], 1)
        # With a diagonal of ones the factorization is safe whatever the residuals' sizes are.
        sizes = (squares + ridge).sqrt()
        correlations = (gram + torch.diag_embed(ridge)) / (sizes[:, :, None] * sizes[:, None, :])
        ones = sizes.amin(1, keepdim=True) / sizes
        factor, _ = torch.linalg.cholesky_ex(correlations)  # `cholesky` would ask the host for its success
        alpha = torch.cholesky_solve(ones[:, :, None], factor)[:, :, 0] * ones
        return alpha / alpha.sum(1, keepdim=True)
