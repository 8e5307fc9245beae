"""What a solve returns: the fixed point and how it was reached."""

from typing import Any, NamedTuple

from torch import Tensor


class SolverStats:
    """Cost and quality of one solve; its backward pass fills in the mismatch and what begins with `backward_`.

    A plain class, neither a tuple nor a dataclass: Lightning and FSDP2 copy those when they look for tensors, and a
    copy made before the backward pass would never learn of it.

    Attributes:
        num_steps: Solver steps that each sample made, shape `(batch,)`, int64.
        forward_nfe: Calls of f in the forward pass.
        relative_residual: `norm(f(z) - z) / (norm(f(z)) + 1e-5)`, dimensionless, shape `(batch,)`, at the returned
            state with a tolerance, and without one at the state before it, the last at which f was evaluated.
        converged: Whether each sample meets the tolerance, shape `(batch,)`, bool; None without a tolerance.
        backward_nfe: Calls of f in the backward pass; None where the adjoint makes none of its own.
        reconstruction_mismatch: Elements of the reconstructed initial states that differ from the true ones, 0-dim
            int64; 0 certifies that the gradient belongs to exactly the iterates of the forward pass. With
            `mismatch="trace"` plus the number of evaluations whose result differs. None where nothing is reconstructed.
        backward_num_products: Vector-Jacobian products with J = df/dz that a linear system in the backward pass took,
            beside the one for x and the parameters; None where no system is solved.
        backward_relative_residual: `norm(J^T w + g - w) / (norm(J^T w + g) + 1e-5 * norm(g))` of its solution w,
            dimensionless, shape `(batch,)`; None as above, and where the sum is cut off by choice.
        residual_curve: Relative residual at each evaluation of the forward pass, shape `(evaluations, batch)`; NaN for
            a sample that had stopped before. None outside of `recorded_residuals()`.
    """

    def __init__(
        self, num_steps: Tensor, forward_nfe: int, relative_residual: Tensor, converged: Tensor | None = None
    ) -> None:
        self.num_steps, self.forward_nfe = num_steps, forward_nfe
        self.relative_residual, self.converged = relative_residual, converged
        self.backward_nfe: int | None = None
        self.reconstruction_mismatch: Tensor | None = None
        self.backward_num_products: int | None = None
        self.backward_relative_residual: Tensor | None = None
        self.residual_curve: Tensor | None = None

    def __repr__(self) -> str:
        return f"SolverStats({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class FixedPointSolution(NamedTuple):
    """`value`, the solver's newest state like `z0` and differentiable, and its `stats`, to be taken by name.

    `earlier` has the solutions of the parts before this one, oldest first, if the solve was made in parts.
    """

    value: Any
    stats: SolverStats
    earlier: "tuple[FixedPointSolution, ...]" = ()
