"""The reversible family: a two-step recurrence, of which the paper's solver and the momentum solver are members.

    u_{k+1} = a * u_{k-1} + c * u_k + b * f(u_k, x),      a + b + c = 1,  a != 0
    u_{k-1} = (u_{k+1} - c * u_k - b * f(u_k, x)) / a     the inverse, with the same single evaluation

    RevDEQ, relaxation beta:      a = 1 - beta,  c = 0,                    b = beta     2 evaluations a step
    momentum mu, relaxation beta: a = -mu,       c = 1 - beta + mu,        b = beta     1 evaluation a step

Every member has the fixed points of f. RevDEQ: McCallum et al. 2025, arXiv:2509.12917, section 3, where u_{-1} = y_0,
u_0 = z_0, u_1 = y_1, u_2 = z_1, ...
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...transforms import is_transformed
from ..exact.arithmetic import (
    AbstractArithmetic,
    AdvanceWithGradient,
    ExactArithmetic,
    FloatArithmetic,
    Recurrence,
    kernels_for,
)
from ..exact.remainders import Remainders
from ..norms import Leaves, Mask, extremes, select
from ..validation import require_choice, require_in_range
from .base import AbstractSolver

Arithmetic = Literal["exact", "exact64", "float64", "float32"]

MAX_DENOMINATOR = 4096
"""Largest denominator of `a` that the exact state takes: in 64 bits its range is 2^19 / denominator, here still 128."""


class TwoStepState(NamedTuple):
    """The two newest states u_{k-1}, u_k in the solver's arithmetic, and what is needed to go back."""

    previous: Leaves
    current: Leaves
    remainders: list[Remainders | None]
    dtypes: list[torch.dtype]
    extremes: Leaves
    """Of the newest state and of the value of f that made it, 0-dim."""
    decoded: Leaves
    decoded_before: Leaves
    """The iterates at which f is evaluated next, forward and back, where they are at hand; otherwise empty."""


@dataclass(frozen=True, kw_only=True)
class AbstractTwoStepSolver(AbstractSolver):
    """A member of the family: it names its coefficients, the rest is shared.

    Attributes:
        arithmetic: How the state is held: "exact" (reversible bit for bit at any depth; in 32 bits, of states in
            float64 in 64), "exact64" (always in 64 bits, for large states), "float64" (as published) or "float32".
    """

    beta: float
    arithmetic: Arithmetic = "exact"

    default_adjoint = "reversible"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in_range("beta", self.beta, "(0, 2)")
        require_choice("arithmetic", self.arithmetic, get_args(Arithmetic))

    @property
    def is_exact(self) -> bool:
        """Whether steps are undone bit for bit."""
        return self.arithmetic.startswith("exact")

    @cached_property
    @abc.abstractmethod
    def recurrence(self) -> Recurrence:
        """The coefficients a, c, b."""

    def require_representable(self, setting: str) -> None:
        """Raise ValueError if the arithmetic cannot hold `a`, which comes from this setting."""
        a = self.recurrence.a
        if self.is_exact and a.denominator > MAX_DENOMINATOR:
            raise ValueError(
                f"{setting}={getattr(self, setting)!r} gives a = {float(a)!r}, which is no fraction with a denominator"
                f" up to {MAX_DENOMINATOR}, as the exact state needs: round it to fewer digits (0.8, 0.125, ...) or"
                " choose arithmetic='float64'"
            )

    def state_arithmetic(self, dtypes: Sequence[torch.dtype]) -> AbstractArithmetic:
        """The arithmetic for a state of leaves with these dtypes."""
        if self.is_exact:
            return self._arithmetics[self.arithmetic == "exact64" or torch.float64 in dtypes]
        return self._arithmetics[self.arithmetic == "float64"]

    @cached_property
    def _arithmetics(self) -> tuple[AbstractArithmetic, AbstractArithmetic]:
        """Of 32 and of 64 bits."""
        if self.is_exact:
            return ExactArithmetic(self.recurrence, wide=False), ExactArithmetic(self.recurrence, wide=True)
        return FloatArithmetic(self.recurrence, torch.float32), FloatArithmetic(self.recurrence, torch.float64)

    def limit(self, z0: Leaves) -> float:
        return self.state_arithmetic([z.dtype for z in z0]).limit()

    def wider_than(self, limit: float) -> str:
        widest = self._arithmetics[1].limit()
        return f", or choose arithmetic='exact64' (a range of {widest:.4g})" if limit < widest else ""

    def init(self, z0: Leaves, *, reversible: bool) -> TwoStepState:
        dtypes = [z.dtype for z in z0]
        arithmetic = self.state_arithmetic(dtypes)
        current = [arithmetic.encode(z) for z in z0]
        remainders = [arithmetic.remainders() if reversible else None for _ in z0]
        return TwoStepState(current, current, remainders, dtypes, extremes(z0), [], [])

    def branch(self, state: TwoStepState) -> TwoStepState:
        return state._replace(remainders=[None] * len(state.current))

    def iterate(self, state: TwoStepState) -> Leaves:
        if not state.decoded:
            state.decoded.extend(self._decode(state.current, state))  # the update needs it too
        return state.decoded

    def iterate_before(self, state: TwoStepState, active: Mask) -> Leaves:
        """The iterate at which f was evaluated to make this state."""
        # Not kept on the way back, where f's derivative is the peak of memory and may not need it.
        return state.decoded_before or self._decode(select(active, state.previous, state.current), state)

    def extremes(self, state: TwoStepState) -> Leaves:
        return state.extremes

    def advance(self, state: TwoStepState, value: Leaves, active: Mask) -> TwoStepState:
        arithmetic = self.state_arithmetic(state.dtypes)
        inputs = (*state.current, *state.previous, *value)
        differentiated = torch.is_grad_enabled() and any(u.requires_grad for u in inputs)
        if (
            active is None
            and not (differentiated or is_transformed())
            and (kernels := kernels_for(state.current[0], torch.int32))
        ):
            leaves = zip(state.previous, state.current, value, state.remainders, state.dtypes, strict=True)
            following, decoded, largest = map(
                list, zip(*(kernels.advance(arithmetic, *leaf) for leaf in leaves), strict=True)
            )
            return TwoStepState(state.current, following, state.remainders, state.dtypes, largest, decoded, [])
        following = []
        updates = zip(state.previous, state.current, value, state.remainders, self.iterate(state), strict=True)
        for u_before, u, v, remainders, z in updates:
            if is_transformed():
                following.append(arithmetic.advance_transformed(u_before, u, v))
            elif differentiated:
                following.append(AdvanceWithGradient.apply(arithmetic, u_before, u, v))
            else:
                following.append(arithmetic.advance(u_before, u, v, remainders, z))
        return state._replace(
            previous=select(active, state.current, state.previous),
            current=select(active, following, state.current),
            extremes=[*extremes(value), *extremes(following, 1 / arithmetic.scale)],
            decoded=[],
            decoded_before=[],
        )

    def invert_step(self, state: TwoStepState, value: Leaves, active: Mask) -> TwoStepState:
        """Undo `advance` with the same evaluation, `value = f(iterate_before(state))`."""
        arithmetic = self.state_arithmetic(state.dtypes)
        if active is None and (kernels := kernels_for(state.current[0], torch.int32)):
            leaves = zip(state.current, state.previous, value, state.remainders, state.dtypes, strict=True)
            before, decoded = map(list, zip(*(kernels.invert_(arithmetic, *leaf) for leaf in leaves), strict=True))
            return state._replace(previous=before, current=state.previous, decoded=[], decoded_before=decoded)
        following = state.current if active is None else [u.clone() for u in state.current]
        undone = zip(following, state.previous, value, state.remainders, strict=True)
        before = [arithmetic.invert_(*leaf) for leaf in undone]
        return state._replace(
            previous=select(active, before, state.previous),
            current=select(active, state.previous, state.current),
            decoded=[],
            decoded_before=[],
        )

    def carry_(self, g_previous: Leaves, g_current: Leaves, products: Sequence[Tensor | None]) -> tuple[Leaves, Leaves]:
        """From the gradients in u_k and u_{k+1}, in their memory, those in u_{k-1} and u_k, the new current one first.

        A product, `(df/du)^T g_current`, may be one of `g_current`.
        """
        a, c, b = self.recurrence.rounded(g_current[0].dtype)
        if products[1:] == [] and products[0] is not None and (kernels := kernels_for(g_current[0], torch.float32)):
            kernels.carry_(g_previous[0], g_current[0], products[0], a, c, b)
            return g_previous, g_current
        for previous, current, product in zip(g_previous, g_current, products, strict=True):
            if product is not None:
                previous.add_(product, alpha=b)
            if c:
                previous.add_(current, alpha=c)
        return g_previous, [current.mul_(a) for current in g_current]

    def reconstruction_mismatch(self, state: TwoStepState, z0: Leaves) -> Tensor:
        """Elements in which a state that was undone to the start differs from the true start, 0-dim int64."""
        arithmetic = self.state_arithmetic(state.dtypes)
        start = [arithmetic.encode(z) for z in z0]
        pairs = zip((*state.previous, *state.current), (*start, *start), strict=True)
        return torch.stack([torch.count_nonzero(a - b) for a, b in pairs]).sum()  # twice as fast as of `a != b`

    def _decode(self, leaves: Leaves, state: TwoStepState) -> Leaves:
        arithmetic = self.state_arithmetic(state.dtypes)
        return [arithmetic.decode(u, dtype) for u, dtype in zip(leaves, state.dtypes, strict=True)]


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

    @cached_property
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

    @cached_property
    def recurrence(self) -> Recurrence:
        return Recurrence(-_fraction(self.momentum), 1.0 - self.beta + self.momentum, float(self.beta))


def _fraction(number: float) -> Fraction:
    """The simple fraction that a decimal stands for (0.8 is 4/5), else the float's own value."""
    simple = Fraction(number).limit_denominator(MAX_DENOMINATOR)
    return simple if float(simple) == number else Fraction(number)
