"""The loop that evaluates f: every solver, every adjoint, forward and in the backward pass's linear system."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DivergenceError
from ..transforms import has_numbers
from . import checks
from .norms import Leaves, residual
from .solution import SolverStats
from .solvers.base import AbstractSolver, State


class Iteration(NamedTuple):
    """How a forward loop ended."""

    state: State  # the newest that can be undone
    value: Leaves
    num_evaluations: int  # whose result entered that state
    stats: SolverStats
    factor: Tensor | None = None  # 1, or NaN if the state diverged, 0-dim; None where that was an error


def iterate_to_fixed_point(
    solver: AbstractSolver, f: Callable[[Leaves], Leaves], z0: Leaves, *, reversible: bool = False, num_kept: int = 0
) -> Iteration:
    """Run the solver from z0; `reversible` keeps what is needed to undo the steps, but for the last `num_kept` of them.

    Calls f `max_steps * evaluations_per_step` times, with a tolerance at most once more. Raises DivergenceError if an
    iterate is not finite or beyond the solver's limit.
    """
    if solver.has_tolerance and checks.is_capturing(z0[0].device):
        raise ValueError(f"a CUDA graph makes a fixed number of steps: set rtol=0 and atol=0, got {solver}")
    watch = _Watch(solver, f, z0)
    state = watch.look_at(solver.init(z0, reversible=reversible and num_kept < solver.num_evaluations))
    num_steps = torch.full(z0[0].shape[:1], solver.max_steps, device=z0[0].device)
    if solver.has_tolerance:
        iteration = _step_until_converged(solver, watch, state, num_steps.zero_())
    else:
        iteration = _step_to_the_end(solver, watch, state, num_steps, num_kept)
    iteration = watch.check(iteration)
    iteration.stats.residual_curve = None if watch.curve is None else torch.stack(watch.curve)
    return iteration


def _step_to_the_end(
    solver: AbstractSolver, watch: "_Watch", state: State, num_steps: Tensor, num_kept: int
) -> Iteration:
    undone: State = None
    num_undone = max(0, solver.num_evaluations - num_kept)
    for k in range(solver.num_evaluations):
        if k == num_undone > 0:
            undone, state = state, solver.branch(state)
        iterate = solver.iterate(state)
        value = watch.evaluate(iterate)
        state = watch.look_at(solver.advance(state, value, None))
    stats = SolverStats(num_steps, watch.nfe, residual(value, iterate).relative)
    return Iteration(undone if num_kept else state, solver.iterate(state), num_undone, stats)


def _step_until_converged(solver: AbstractSolver, watch: "_Watch", state: State, num_steps: Tensor) -> Iteration:
    """Test each sample at the start of every step, with the evaluation that the step needs anyway."""
    active = torch.ones_like(num_steps, dtype=torch.bool)
    interval = host_check_interval(num_steps.device) if has_numbers(num_steps) else solver.max_steps
    for step in range(solver.max_steps + 1):
        for part in range(solver.evaluations_per_step):
            iterate = solver.iterate(state)
            value = watch.evaluate(iterate, active)
            if part == 0 and step > 0:
                last = residual(value, iterate, solver.rtol, solver.atol)
                active = active & ~last.converged
                if step == solver.max_steps or (step % interval == 0 and not active.any()):
                    stats = SolverStats(num_steps, watch.nfe, last.relative, last.converged)
                    return Iteration(state, iterate, step * solver.evaluations_per_step, stats)
            state = watch.look_at(solver.advance(state, value, active))
        num_steps = num_steps + active
    raise AssertionError("the last step always returns")


def host_check_interval(device: torch.device) -> int:
    """Steps between two checks by the host whether all samples have stopped: free on a CPU, a stall elsewhere."""
    return 4 if checks.host_must_wait(device) else 1


class _Watch:
    """Evaluates f and keeps a few numbers of each iterate on the device, so that the host waits for it only once."""

    def __init__(self, solver: AbstractSolver, f: Callable[[Leaves], Leaves], z0: Leaves) -> None:
        self.solver, self.f, self.nfe, self.limit = solver, f, 0, solver.limit(z0)
        self.extremes: list[Leaves] = []
        self.curve: list[Tensor] | None = [] if _records_residuals.get() else None

    def evaluate(self, iterate: Leaves, active: Tensor | None = None) -> Leaves:
        value = self.f(iterate)
        self.nfe += 1
        if self.curve is not None:
            relative = residual(value, iterate).relative
            self.curve.append(relative if active is None else relative.masked_fill(~active, math.nan))
        return value

    def look_at(self, state: State) -> State:
        """Keep the state's extremes: of the first, and after every evaluation."""
        self.extremes.append(self.solver.extremes(state))
        return state

    def check(self, iteration: Iteration) -> Iteration:
        """Raise DivergenceError for the first iterate out of range; where the host does not look, the value is NaN."""
        magnitudes = torch.stack([extreme for row in self.extremes for extreme in row]).abs()
        errors = deferred_errors.get()
        # With a tolerance the host waits for the device anyway.
        is_later = checks.host_must_wait(magnitudes.device) and not self.solver.has_tolerance
        if has_numbers(magnitudes) and is_later:
            checks.check_later(magnitudes, partial(self._judge, errors))
        elif has_numbers(magnitudes):
            self._judge(errors, magnitudes.tolist())
            if errors is None:
                return iteration
        # A factor, which makes the gradient NaN, too: other processes learn of it by that.
        factor = torch.where((magnitudes < self.limit).all(), 1.0, math.nan)
        iteration.stats.relative_residual = iteration.stats.relative_residual * factor
        return iteration._replace(value=[v * factor for v in iteration.value], factor=factor)

    def _judge(self, errors: "list[DivergenceError] | None", magnitudes: list[float]) -> None:
        limit, rest = self.limit, iter(magnitudes)
        sizes = [max(islice(rest, len(row)), key=_with_nan_above_all) for row in self.extremes]
        for k, size in enumerate(sizes):
            if size < limit and math.isfinite(size):
                continue
            beyond = f"reached {size:.4g}, beyond the range of {limit:.4g} of its arithmetic,"
            what = beyond if math.isfinite(size) else f"is not finite ({size})"
            step = (k - 1) // self.solver.evaluations_per_step + 1
            where = "in z0" if k == 0 else f"after {k} evaluations of f (step {step})"
            error = DivergenceError(
                f"the state {what} {where}; largest magnitude before: {max(sizes[:k], default=0.0):.4g}. Look for NaN"
                " in z0, x and the parameters; if f expands, normalize its output or lower beta or max_steps"
                f"{self.solver.wider_than(limit)}. Solver: {self.solver}"
            )
            if errors is None:
                raise error
            errors.append(error)
            return


def _with_nan_above_all(size: float) -> tuple[bool, float]:
    return math.isnan(size), size


_records_residuals: ContextVar[bool] = ContextVar("records_residuals", default=False)
deferred_errors: ContextVar[list[DivergenceError] | None] = ContextVar("deferred_errors", default=None)
"""The list of `deferred_divergence`, None outside of it."""


@contextmanager
def _within(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def recorded_residuals() -> AbstractContextManager[None]:
    """Within, every solve fills in `stats.residual_curve`, without further evaluations of f."""
    return _within(_records_residuals, True)


def deferred_divergence(errors: list[DivergenceError]) -> AbstractContextManager[None]:
    """Within, a solve that diverges returns NaN and appends its error to the list; so does its backward pass, later.

    On a GPU the error may come later: at the latest from `settle_checks()`.

    For several processes that work together: if one raised, the others would wait for it forever. NaN reaches all of
    them through the collective operations; whoever opened this context must then look at the list and raise.
    """
    return _within(deferred_errors, errors)
