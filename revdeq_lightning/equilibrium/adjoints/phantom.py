"""The phantom gradient: that of a few relaxed steps from the solver's result, in the place of the fixed point's.

unrolled:  h_0 = z (a constant),  h_{t+1} = (1 - beta) * h_t + beta * f(h_t, x);  the gradient of h_num_steps
neumann:   w = beta * sum_{t < num_steps} ((1 - beta) * I + beta * J^T)^t g,  dL/dtheta = (df/dtheta)^T w
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ...transforms import is_forward_mode, is_functorch
from ..function import EquilibriumFunction
from ..norms import Leaves
from ..solution import SolverStats
from ..solvers.base import AbstractSolver
from ..validation import require_choice, require_count, require_in_range
from .attached import AdjointSystem, attach, solve_with_cotangents, solve_without_gradient
from .base import AbstractAdjoint

PhantomKind = Literal["unrolled", "neumann"]


@dataclass(frozen=True, kw_only=True)
class PhantomAdjoint(AbstractAdjoint):
    """An approximate gradient at a fixed cost, for every solver; with more steps it tends to the implicit gradient.

    The value returned is the solver's: the steps serve the gradient alone. With one step and beta 1 it is the
    Jacobian-free gradient (JFB). Both kinds agree at an exact fixed point. Nothing reports how far the gradient is off,
    nor whether f has a fixed point: measure it with `gradient_error`.

    Cost: "unrolled" `num_steps` evaluations of f more in the forward pass, and their memory; "neumann" one evaluation
    and its memory, and `num_steps - 1` vector-Jacobian products in the backward pass. Autograd records f in the forward
    pass, so f may use any tensor. The gradient of z0 is 0.

    Args:
        num_steps: Relaxed steps, at least 1.
        beta: Relaxation parameter, the weight of the new evaluation, in (0, 2).
        kind: "unrolled" or "neumann".

    Source: Geng et al. 2021, arXiv:2111.05177; one step: Fung et al. 2022, arXiv:2103.12803.
    """

    num_steps: int = 10
    beta: float = 0.5
    kind: PhantomKind = "unrolled"

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps)
        require_in_range("beta", self.beta, "(0, 2)")
        require_choice("kind", self.kind, get_args(PhantomKind))

    def solve(self, f: EquilibriumFunction, z0: Leaves, solver: AbstractSolver) -> tuple[Leaves, SolverStats]:
        if self.kind == "neumann":
            self.refuse_transforms(is_forward_mode() or (is_functorch() and torch.is_grad_enabled()))
            return solve_with_cotangents(f, z0, solver, self._cotangents)
        value, stats = solve_without_gradient(f, z0, solver)
        if not (torch.is_grad_enabled() or is_forward_mode()):
            return value, stats
        h = value
        for _ in range(self.num_steps):
            h = [(1 - self.beta) * a + self.beta * b for a, b in zip(h, f(h), strict=True)]
        stats.forward_nfe = f.nfe
        return attach(value, h, z0, lambda grads: grads), stats

    def _cotangents(self, system: AdjointSystem, stats: SolverStats, grads: Leaves) -> Leaves:
        self.refuse_double_backward()
        total = [self.beta * g for g in system.begin(grads)]
        for _ in range(self.num_steps - 1):
            total = [(1 - self.beta) * w + self.beta * v for w, v in zip(total, system(total), strict=True)]
        stats.backward_nfe, stats.backward_num_products = 0, system.num_products
        return system.end(total)
