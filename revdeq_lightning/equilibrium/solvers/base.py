"""What every solver shares: settings, stopping rule, and one evaluation of f at a time."""

import abc
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..norms import Leaves, Mask, extremes
from ..validation import require_count, require_in_range

State = Any
"""What a solver carries from one evaluation to the next: the newest iterate, or a type of its own."""


@dataclass(frozen=True, kw_only=True)
class AbstractSolver(abc.ABC):
    """An iteration for `z = f(z, x)` that makes one evaluation of f at a time, and its stopping rule.

    A sample stops when `norm(f(z) - z) <= atol + rtol * (norm(f(z)) + 1e-5)`; its value then stays as it is, whatever
    the others do. With both tolerances 0 every sample makes `max_steps` steps, and nothing is tested.

    Attributes:
        max_steps: Most steps a sample makes; one step is `evaluations_per_step` evaluations of f.
        rtol: Relative tolerance, dimensionless.
        atol: Absolute tolerance, in the units of the state's L2 norm.
    """

    max_steps: int = 8
    rtol: float = 0.0
    atol: float = 0.0

    evaluations_per_step = 1
    default_adjoint = "backprop"
    """Name in `ADJOINTS` of the adjoint that a configuration uses if it names none."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Real) and hasattr(value, "dtype"):  # of NumPy: the decimals shown are meant
                object.__setattr__(self, name, (int if isinstance(value, Integral) else float)(str(value)))
        require_count("max_steps", self.max_steps)
        require_in_range("rtol", self.rtol, "[0, inf)")
        require_in_range("atol", self.atol, "[0, inf)")

    @property
    def num_evaluations(self) -> int:
        """Most evaluations of f that enter the state."""
        return self.max_steps * self.evaluations_per_step

    @property
    def has_tolerance(self) -> bool:
        """Whether samples can stop before `max_steps`."""
        return self.rtol > 0 or self.atol > 0

    def init(self, z0: Leaves, *, reversible: bool) -> State:
        """State before the first evaluation; `reversible`: with what is needed to undo the steps."""
        return list(z0)

    def iterate(self, state: State) -> Leaves:
        """The newest iterate, at which f is evaluated next, in the dtypes of z0."""
        return state  # type: ignore[no-any-return]

    @abc.abstractmethod
    def advance(self, state: State, value: Leaves, active: Mask) -> State:
        """State after one evaluation, `value = f(iterate)`; samples that are not active stay as they are."""

    def branch(self, state: State) -> State:
        """The state as one that goes on and is not to be undone, while the given one stays as it is."""
        return state

    def extremes(self, state: State) -> Leaves:
        """0-dim numbers that show whether the newest state is finite and within the limit."""
        return extremes(self.iterate(state))

    def limit(self, z0: Leaves) -> float:
        """Magnitude that the extremes must stay below."""
        return float("inf")

    def wider_than(self, limit: float) -> str:
        """How to set a limit above this one, to follow "do this or that"; empty if there is no way."""
        return ""
