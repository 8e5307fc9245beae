"""What every solver shares: settings, stopping rule, and the loop that evaluates f."""

import abc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..function import Leaves
from ..norms import Residual, broadcast_to_leaf, residual
from ..solution import SolverStats
from ..validation import require_count, require_in_range

State = Any
"""What a solver carries from one evaluation to the next; each solver has its own type."""


_records_residuals: ContextVar[bool] = ContextVar("records_residuals", default=False)


_deferred: ContextVar["list[DivergenceError] | None"] = ContextVar("deferred", default=None)


class DivergenceError(RuntimeError):
    """The state became non-finite or left the range that its arithmetic holds."""


@contextmanager
def deferred_divergence(errors: "list[DivergenceError]") -> Iterator[None]:
    """Within, a solve that diverges returns NaN and adds its error to the list; so does its backward pass, later.

    For several processes that work together: one that raised would leave the others waiting for it. Its NaN reaches
    all of them by the usual ways, and then whoever opened this must look at the list, and raise.
    """
    token = _deferred.set(errors)
    try:
        yield
    finally:
        _deferred.reset(token)


def divergence_errors() -> "list[DivergenceError] | None":
    """The list of `deferred_divergence`, None outside of it."""
    return _deferred.get()


@contextmanager
def recorded_residuals() -> Iterator[None]:
    """Within, every solve fills in `stats.residual_curve`: a few norms for each evaluation, no evaluation more."""
    token = _records_residuals.set(True)
    try:
        yield
    finally:
        _records_residuals.reset(token)


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

    def __post_init__(self) -> None:
        require_count("max_steps", self.max_steps)
        require_in_range("rtol", self.rtol, "[0, inf)")
        require_in_range("atol", self.atol, "[0, inf)")

    @property
    def has_tolerance(self) -> bool:
        """Whether samples can stop before `max_steps`."""
        return self.rtol > 0 or self.atol > 0

    @abc.abstractmethod
    def init(self, z0: Leaves, *, reversible: bool) -> State:
        """State before the first evaluation; `reversible`: with what is needed to undo the steps."""

    @abc.abstractmethod
    def iterate(self, state: State) -> Leaves:
        """The newest iterate, at which f is evaluated next, in the dtypes of z0."""

    @abc.abstractmethod
    def advance(self, state: State, value: Leaves, active: Tensor | None) -> State:
        """State after one evaluation, `value = f(iterate)`; samples not in `active`, `(batch,)`, stay as they are."""

    def limit(self) -> float:
        """Magnitude that the iterates must stay below."""
        return float("inf")


class Evaluation(Protocol):
    """f on leaves, with a count of its calls."""

    @property
    def nfe(self) -> int:
        """Calls so far."""

    def __call__(self, z: Leaves, x: Sequence[Any]) -> Leaves:
        """Evaluate f once."""


class Iteration(NamedTuple):
    """How a forward loop ended."""

    state: State
    value: Leaves
    num_evaluations: int
    """Evaluations whose result entered the state."""
    stats: SolverStats


def iterate_to_fixed_point(
    solver: AbstractSolver, f: Evaluation, z0: Leaves, x: Sequence[Any], *, reversible: bool = False
) -> Iteration:
    """Run the solver. Without a tolerance `max_steps * evaluations_per_step` calls of f, with one at most one more.

    The state's magnitudes stay on the device until the end: one host synchronisation a solve, none an evaluation. With
    a tolerance the host asks now and then whether any sample is still active.

    Raises:
        DivergenceError: If an iterate is not finite or beyond the solver's limit.
    """
    state = solver.init(z0, reversible=reversible)
    per_step = solver.evaluations_per_step
    batch = z0[0].shape[0]
    active: Tensor | None = None
    num_steps = torch.full((batch,), solver.max_steps, device=z0[0].device)
    if solver.has_tolerance:
        active = torch.ones(batch, dtype=torch.bool, device=z0[0].device)
        num_steps = torch.zeros_like(num_steps)
    interval = host_check_interval(z0[0].device)
    extremes: list[list[Tensor]] = []
    curve: list[Tensor] | None = [] if _records_residuals.get() else None
    last: Residual | None = None
    num_evaluations = 0
    for step in range(solver.max_steps):
        for part in range(per_step):
            iterate = solver.iterate(state)
            extremes.append(_extremes(iterate))
            value = f(iterate, x)
            if curve is not None:
                curve.append(_residual_of(active, value, iterate))
            if active is not None and part == 0 and step > 0:
                last = residual(value, iterate, solver.rtol, solver.atol)
                active = active & ~last.converged
                if step % interval == 0 and not active.any():
                    break
            elif active is None and step == solver.max_steps - 1 and part == per_step - 1:
                last = residual(value, iterate)
            state = solver.advance(state, value, active)
            num_evaluations += 1
        else:
            if active is not None:
                num_steps += active
            continue
        break
    iterate = solver.iterate(state)
    extremes.append(_extremes(iterate))
    _check_magnitudes(extremes, solver)
    if active is not None and num_evaluations == solver.max_steps * per_step:
        value = f(iterate, x)
        if curve is not None:
            curve.append(_residual_of(active, value, iterate))
        last = residual(value, iterate, solver.rtol, solver.atol)
    assert last is not None
    converged = None if active is None else last.converged
    stats = SolverStats(num_steps, f.nfe, last.relative, converged)
    stats.residual_curve = None if curve is None else torch.stack(curve)
    return Iteration(state, iterate, num_evaluations, stats)


def host_check_interval(device: torch.device) -> int:
    """Steps between two questions of the host whether all samples have stopped: free on a CPU, a stall elsewhere."""
    return 1 if device.type == "cpu" else 4


def select(active: Tensor, new: Leaves, old: Leaves) -> Leaves:
    """The new values of the active samples, the old ones of the others."""
    return [torch.where(broadcast_to_leaf(active, a), a, b) for a, b in zip(new, old, strict=True)]


@torch.no_grad()
def _residual_of(active: Tensor | None, value: Leaves, iterate: Leaves) -> Tensor:
    """Relative residual of the samples that this evaluation is for; NaN, which is no residual, for the others."""
    relative = residual(value, iterate).relative
    return relative if active is None else relative.masked_fill(~active, math.nan)


@torch.no_grad()
def _extremes(leaves: Leaves) -> list[Tensor]:
    """Smallest and largest element of each leaf, NaN if there is one: `vector_norm(inf)` is 20 times slower on CPUs."""
    return [extreme for leaf in leaves for extreme in torch.aminmax(leaf)]


def _check_magnitudes(extremes: list[list[Tensor]], solver: AbstractSolver) -> None:
    limit = solver.limit()
    sizes = torch.stack([e for row in extremes for e in row]).view(len(extremes), -1).abs().amax(1).tolist()
    for k, size in enumerate(sizes):
        if math.isfinite(size) and size < limit:
            continue
        what = (
            f"reached {size:.4g}, beyond the range of {limit:.4g} of its arithmetic,"
            if math.isfinite(size)
            else f"is not finite ({size})"
        )
        where = "in z0" if k == 0 else f"after {k} evaluations of f (step {(k - 1) // solver.evaluations_per_step + 1})"
        raise DivergenceError(
            f"the state {what} {where}; largest magnitude before: {max(sizes[:k], default=0.0):.4g}. Look for NaN in"
            f" z0, x and the parameters; if f expands, normalise its output or lower beta or max_steps. Solver:"
            f" {solver}"
        )
