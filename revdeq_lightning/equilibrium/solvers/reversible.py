"""The reversible family: a two-step recurrence, of which the paper's solver and the momentum solver are members.

    u_{k+1} = a * u_{k-1} + c * u_k + b * f(u_k, x),      a + b + c = 1,  a != 0
    u_{k-1} = (u_{k+1} - c * u_k - b * f(u_k, x)) / a     the inverse, with the same single evaluation

    RevDEQ, relaxation beta:      a = 1 - beta,  c = 0,                    b = beta     2 evaluations a step
    momentum mu, relaxation beta: a = -mu,       c = 1 - beta + mu,        b = beta     1 evaluation a step

Every member has the fixed points of f. RevDEQ: McCallum et al. 2025, arXiv:2509.12917, section 3, where u_{-1} = y_0,
u_0 = z_0, u_1 = y_1, u_2 = z_1, ...
"""

import abc
import functools
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...transforms import is_transformed
from ..exact.arithmetic import AbstractArithmetic, AdvanceWithGradient, ExactArithmetic, FloatArithmetic, Recurrence
from ..exact.remainders import Remainders
from ..norms import Leaves, Mask, select
from ..validation import require_choice, require_in_range
from .base import AbstractSolver

Arithmetic = Literal["exact", "float64", "float32"]

MAX_DENOMINATOR = 4096
"""Largest denominator of `a` that the exact state takes: its range is 2^20 / denominator, here still 256."""


class TwoStepState(NamedTuple):
    """The two newest states u_{k-1}, u_k in the solver's arithmetic, and what is needed to go back."""

    previous: Leaves
    current: Leaves
    remainders: list[Remainders | None]
    dtypes: list[torch.dtype]


@dataclass(frozen=True, kw_only=True)
class AbstractTwoStepSolver(AbstractSolver):
    """A member of the family: it names its coefficients, the rest is shared.

    Attributes:
        arithmetic: How the state is held: "exact" (reversible bit for bit at any depth), "float64" (as published) or
            "float32".
        compiled: Whether torch.compile compiles the updates of the exact state: as exact, in a third of the time,
            which counts where f is small. Without effect with a tolerance.
    """

    beta: float
    arithmetic: Arithmetic = "exact"
    compiled: bool = False

    default_adjoint = "reversible"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in_range("beta", self.beta, "(0, 2)")
        require_choice("arithmetic", self.arithmetic, get_args(Arithmetic))
        if self.compiled and self.arithmetic != "exact":
            raise ValueError(f"compiled=True belongs to arithmetic='exact', got {self.arithmetic!r}: remove it")

    @property
    @abc.abstractmethod
    def recurrence(self) -> Recurrence:
        """The coefficients a, c, b."""

    def require_representable(self, setting: str) -> None:
        """Raise ValueError if the arithmetic cannot hold `a`, which comes from this setting."""
        a = self.recurrence.a
        if self.arithmetic == "exact" and a.denominator > MAX_DENOMINATOR:
            raise ValueError(
                f"{setting}={getattr(self, setting)!r} gives a = {float(a)!r}, which is no fraction with a denominator"
                f" up to {MAX_DENOMINATOR}, as the exact state needs: round it to fewer digits (0.8, 0.125, ...) or"
                " choose arithmetic='float64'"
            )

    @cached_property
    def state_arithmetic(self) -> AbstractArithmetic:
        """The arithmetic that `arithmetic` names."""
        if self.arithmetic == "exact":
            return ExactArithmetic(self.recurrence, compiled=self.compiled)
        return FloatArithmetic(self.recurrence, torch.float64 if self.arithmetic == "float64" else torch.float32)

    def limit(self) -> float:
        return self.state_arithmetic.limit()

    def init(self, z0: Leaves, *, reversible: bool) -> TwoStepState:
        current = [self.state_arithmetic.encode(z) for z in z0]
        remainders = [self.state_arithmetic.remainders(u) if reversible else None for u in current]
        return TwoStepState([u.clone() for u in current], current, remainders, [z.dtype for z in z0])

    def branch(self, state: TwoStepState) -> TwoStepState:
        previous, current = ([u.clone() for u in leaves] for leaves in (state.previous, state.current))
        return state._replace(previous=previous, current=current, remainders=[None] * len(current))

    def iterate(self, state: TwoStepState) -> Leaves:
        return self._decode(state.current, state)

    def iterate_before(self, state: TwoStepState, active: Mask) -> Leaves:
        """The iterate at which f was evaluated to make this state."""
        return self._decode(select(active, state.previous, state.current), state)

    def advance(self, state: TwoStepState, value: Leaves, active: Mask) -> TwoStepState:
        arithmetic = self.state_arithmetic
        inputs = (*state.current, *state.previous, *value)
        differentiated = torch.is_grad_enabled() and any(u.requires_grad for u in inputs)
        following = []
        for u_before, u, v, remainders in zip(state.previous, state.current, value, state.remainders, strict=True):
            if is_transformed():
                following.append(arithmetic.advance_transformed(u_before, u, v))
            elif differentiated:
                following.append(AdvanceWithGradient.apply(arithmetic, u_before, u, v))
            else:
                memory = u_before if active is None else u_before.clone()
                following.append(arithmetic.advance_(memory, u, v, remainders, active))
        return state._replace(
            previous=select(active, state.current, state.previous), current=select(active, following, state.current)
        )

    def invert_step(self, state: TwoStepState, value: Leaves, active: Mask) -> TwoStepState:
        """Undo `advance` with the same evaluation, `value = f(iterate_before(state))`."""
        before = []
        for u, u_next, v, remainders in zip(state.previous, state.current, value, state.remainders, strict=True):
            memory = u_next if active is None else u_next.clone()
            before.append(self.state_arithmetic.invert_(memory, u, v, remainders, active))
        return state._replace(
            previous=select(active, before, state.previous), current=select(active, state.previous, state.current)
        )

    def reconstruction_mismatch(self, state: TwoStepState, z0: Leaves) -> Tensor:
        """Elements in which a state that was undone to the start differs from the true start, 0-dim int64."""
        start = [self.state_arithmetic.encode(z) for z in z0]
        pairs = zip((*state.previous, *state.current), (*start, *start), strict=True)
        return torch.stack([(a != b).sum() for a, b in pairs]).sum()

    def _decode(self, leaves: Leaves, state: TwoStepState) -> Leaves:
        return [self.state_arithmetic.decode(u, dtype) for u, dtype in zip(leaves, state.dtypes, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ReversibleSolver(AbstractTwoStepSolver):
    """The paper's solver: two coupled relaxed iterations, 2 evaluations of f a step.

        y_{n+1} = (1 - beta) * y_n + beta * f(z_n,     x)
        z_{n+1} = (1 - beta) * z_n + beta * f(y_{n+1}, x)

    Args:
        beta: Relaxation parameter, the weight of the new evaluation, in (0, 2) but not 1; with arithmetic "exact" a
            fraction with a denominator up to 4096.

    Source: McCallum et al. 2025, arXiv:2509.12917, section 3.
    """

    beta: float = 0.8

    evaluations_per_step = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 1:
            raise ValueError(f"beta must not be 1, got {self.beta!r}: the inverse divides by 1 - beta; use 0.8")
        self.require_representable("beta")

    @property
    def recurrence(self) -> Recurrence:
        return Recurrence(1 - _fraction(self.beta), 0.0, float(self.beta))


@dataclass(frozen=True, kw_only=True)
class MomentumSolver(AbstractTwoStepSolver):
    """Relaxation with momentum (the heavy ball), 1 evaluation of f a step.

        u_{k+1} = u_k + beta * (f(u_k, x) - u_k) + momentum * (u_k - u_{k-1})

    With a small momentum (1/16, 1/8) it came nearer to the fixed point than the paper's solver after the same number of
    evaluations on both maps measured; with 1/4 it did not where df/du has complex eigenvalues (see `benchmarks/`). Its
    inverse divides by the momentum, so only arithmetic "exact" makes it reversible in practice.

    Args:
        beta: Relaxation parameter, the weight of the new evaluation, in (0, 2).
        momentum: Weight of the last move, in (-1, 1) but not 0; with arithmetic "exact" a fraction with a denominator
            up to 4096.

    Source: reversibility by momentum: Sander et al. 2021, arXiv:2102.07870.
    """

    beta: float = 1.0
    momentum: float = 0.125

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in_range("momentum", self.momentum, "(-1, 1)")
        if self.momentum == 0:
            raise ValueError(f"momentum must be nonzero, got {self.momentum!r}: the inverse divides by it; use 0.125")
        self.require_representable("momentum")

    @property
    def recurrence(self) -> Recurrence:
        return Recurrence(-_fraction(self.momentum), 1.0 - self.beta + self.momentum, float(self.beta))


@functools.cache
def _fraction(number: float) -> Fraction:
    """The simple fraction that a decimal stands for (0.8 is 4/5), else the float's own value."""
    simple = Fraction(number).limit_denominator(MAX_DENOMINATOR)
    return simple if float(simple) == number else Fraction(number)
