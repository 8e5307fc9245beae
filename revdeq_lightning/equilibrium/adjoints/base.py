"""What adjoints share."""

import abc
import warnings
from typing import Literal

import torch

from ..function import EquilibriumFunction
from ..norms import Leaves
from ..solution import SolverStats
from ..solvers.base import AbstractSolver

Policy = Literal["warn", "raise", "ignore"]
"""What to do about a gradient that is not what it should be."""


class AbstractAdjoint(abc.ABC):
    """A rule for the gradient of a solve: it runs the solver's loop and makes the result differentiable."""

    @abc.abstractmethod
    def solve(self, f: EquilibriumFunction, z0: Leaves, solver: AbstractSolver) -> tuple[Leaves, SolverStats]:
        """Run `solver` on f from `z0`, differentiable in z0, x and the parameters of f."""

    def check(self, solver: AbstractSolver) -> None:  # noqa: B027
        """Raise ValueError if this adjoint does not support the solver."""

    def refuse_transforms(self, is_transformed: bool) -> None:
        """Raise where a transform would not see this gradient."""
        if is_transformed:
            raise RuntimeError(
                f"{type(self).__name__} has no gradient in forward mode, within torch.func (grad, vmap, jvp, ...) or of"
                " many outputs at once: use BackpropAdjoint(), or torch.no_grad() if vmap is to give the value alone"
            )

    def refuse_double_backward(self) -> None:
        """Raise where the backward pass itself would be differentiated."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__} has no double backward, got create_graph=True: use"
                " BackpropAdjoint() for second derivatives"
            )


def report(policy: Policy, message: str, warning: type[Warning], error: type[Exception]) -> None:
    """Warn or raise, as the policy says."""
    if policy == "raise":
        raise error(message)
    if policy == "warn":
        warnings.warn(message, warning, stacklevel=3)
