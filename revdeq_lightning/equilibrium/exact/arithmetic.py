"""How a state of the two-step recurrence is held and updated.

    u_{k+1} = a * u_{k-1} + c * u_k + b * f(u_k, x),      a + b + c = 1

In floating point every inverse step divides a rounding error by `a`, so that the reconstruction goes wrong at depth.
Here the default is `ExactArithmetic`: whole numbers and remainders, with which the inverse returns the same bits at any
depth.
"""

import abc
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .remainders import Remainders, divisor

MAX_DENOMINATOR = 4096
"""Largest denominator of `a` that the exact state takes: its range is 2^20 / denominator, here still 256."""


class Recurrence(NamedTuple):
    """Coefficients of `u_{k+1} = a * u_{k-1} + c * u_k + b * f(u_k, x)`."""

    a: Fraction
    c: float
    b: float


class AbstractArithmetic(abc.ABC):
    """Representation of one tensor of the state, with the update and its inverse.

    Methods that end in an underscore overwrite their first argument; `encode` and `decode` always return new memory.
    """

    dtype: torch.dtype
    scale: float
    """Size of 1.0 in the representation."""

    @abc.abstractmethod
    def encode(self, u: Tensor) -> Tensor:
        """Represent a tensor; the derivative is that of the scaling."""

    def decode(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor that a state represents."""
        # Scaling by a power of 2 commutes with rounding: convert first, and scale the smaller tensor.
        wide = torch.promote_types(dtype, torch.float32)
        return state.to(wide, copy=True).mul_(1 / self.scale).to(dtype)

    @abc.abstractmethod
    def advance_(
        self,
        previous: Tensor,
        current: Tensor,
        value: Tensor,
        recurrence: Recurrence,
        remainders: Remainders | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Next state from the two newest ones and `value = f(current)`, in the memory of `previous`."""

    @abc.abstractmethod
    def invert_(
        self,
        following: Tensor,
        current: Tensor,
        value: Tensor,
        recurrence: Recurrence,
        remainders: Remainders | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Undo `advance_`: the state before `current`, in the memory of `following`."""

    @abc.abstractmethod
    def check(self, recurrence: Recurrence, origin: str) -> None:
        """Raise ValueError if the recurrence cannot be represented; `origin` names the setting it comes from."""

    @abc.abstractmethod
    def limit(self, recurrence: Recurrence) -> float:
        """Magnitude that a state must stay below."""

    @abc.abstractmethod
    def remainders(self, state: Tensor, recurrence: Recurrence) -> Remainders | None:
        """Empty storage for what the updates of `state` destroy; None if nothing is kept."""


class ExactArithmetic(AbstractArithmetic):
    """States are whole numbers `U = round(2^32 * u)` in float64; the update is invertible bit for bit.

    With `a = p / q`:

        t = p * U_{k-1},  s = floor(t / q),  r = t - q * s,  U_{k+1} = s + round(2^32 * (c * u_k + b * f(u_k)))

    The remainder `r` in [0, q) is kept, log2(q) bits an element and evaluation; no scheme can keep less,
    as it is just what the contraction destroys. The inverse `U_{k-1} = (q * (U_{k+1} - g) + r) / p` is an exact
    division.

    All is exact while `max(|p|, q) * |U| < 2^52`: one bit less than float64 holds, so that the rounded quotient never
    reaches the next whole number. float64 rather than int64, because integer division does not vectorise on CPUs.

    Args:
        compiled: Whether the updates are compiled; with a tolerance, where samples stop one by one, they never are.
    """

    dtype = torch.float64
    scale = 2.0**32

    def __init__(self, *, compiled: bool = False) -> None:
        self.compiled = compiled

    def encode(self, u: Tensor) -> Tensor:
        if torch.is_grad_enabled() and u.requires_grad:
            return _round(u.to(torch.float64) * self.scale)
        return u.to(torch.float64, copy=True).mul_(self.scale).round_()

    def advance_(
        self,
        previous: Tensor,
        current: Tensor,
        value: Tensor,
        recurrence: Recurrence,
        remainders: Remainders | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        if self.compiled and remainders is not None and active is None:
            word = remainders.begin_push()
            kernels.run(kernels.advance_, previous, current, value, word, *self._coefficients(recurrence))
            return previous
        p, q = recurrence.a.numerator, recurrence.a.denominator
        if p != 1:
            previous.mul_(p)
        scratch = torch.empty_like(previous) if remainders is None else remainders.scratch
        quotient = torch.div(previous, divisor(q, previous), out=scratch).floor_()
        if remainders is not None:
            remainders.push_(previous.sub_(quotient, alpha=q), active)
        return self._increment(current, value, recurrence, out=previous).add_(quotient)

    def invert_(
        self,
        following: Tensor,
        current: Tensor,
        value: Tensor,
        recurrence: Recurrence,
        remainders: Remainders | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        assert remainders is not None, "the exact state is invertible only with its remainders"
        if self.compiled and active is None:
            word = remainders.words[remainders.begin_pop()]
            kernels.run(kernels.invert_, following, current, value, word, *self._coefficients(recurrence))
            remainders.end_pop()
            return following
        p, q = recurrence.a.numerator, recurrence.a.denominator
        following.sub_(self._increment(current, value, recurrence, out=remainders.scratch))
        torch.add(remainders.pop_(active), following, alpha=q, out=following)
        return following if p == 1 else following.div_(divisor(p, following))

    def _increment(self, current: Tensor, value: Tensor, recurrence: Recurrence, out: Tensor) -> Tensor:
        """`round(2^32 * (c * u_k + b * f(u_k)))`: depends on u_k alone, so that both directions get the same bits."""
        increment = out.copy_(value).mul_(recurrence.b * self.scale)
        if recurrence.c != 0:
            increment.add_(current, alpha=recurrence.c)
        return increment.round_()

    def _coefficients(self, recurrence: Recurrence) -> tuple[int, int, float, float]:
        return recurrence.a.numerator, recurrence.a.denominator, recurrence.c, recurrence.b * self.scale

    def check(self, recurrence: Recurrence, origin: str) -> None:
        if recurrence.a.denominator > MAX_DENOMINATOR:
            raise ValueError(
                f"{origin} gives a = {float(recurrence.a)!r}, which is no fraction with a denominator up to"
                f" {MAX_DENOMINATOR}, as the exact state needs: round it to fewer digits (0.8, 0.125, ...) or choose"
                f" arithmetic='float64'"
            )

    def limit(self, recurrence: Recurrence) -> float:
        return 2.0**52 / self.scale / max(abs(recurrence.a.numerator), recurrence.a.denominator)

    def remainders(self, state: Tensor, recurrence: Recurrence) -> Remainders:
        return Remainders.empty(state, recurrence.a.denominator)


class FloatArithmetic(AbstractArithmetic):
    """States are floating-point numbers, float64 as published or float32: reversible only up to rounding.

    The reconstruction error grows by 1 / |a| and more in every step: see `benchmarks/` before you trust a gradient made
    with it.
    """

    scale = 1.0

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, u: Tensor) -> Tensor:
        return u.to(self.dtype, copy=True)

    def advance_(
        self,
        previous: Tensor,
        current: Tensor,
        value: Tensor,
        recurrence: Recurrence,
        remainders: Remainders | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        previous.mul_(float(recurrence.a)).add_(value.to(self.dtype), alpha=recurrence.b)
        return previous.add_(current, alpha=recurrence.c) if recurrence.c else previous

    def invert_(
        self,
        following: Tensor,
        current: Tensor,
        value: Tensor,
        recurrence: Recurrence,
        remainders: Remainders | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        following.sub_(value.to(self.dtype), alpha=recurrence.b)
        if recurrence.c:
            following.sub_(current, alpha=recurrence.c)
        return following.div_(float(recurrence.a))

    def check(self, recurrence: Recurrence, origin: str) -> None:
        """Every recurrence can be represented."""

    def limit(self, recurrence: Recurrence) -> float:
        return float("inf")

    def remainders(self, state: Tensor, recurrence: Recurrence) -> None:
        return None


ARITHMETICS: dict[str, AbstractArithmetic] = {
    "exact": ExactArithmetic(),
    "float64": FloatArithmetic(torch.float64),
    "float32": FloatArithmetic(torch.float32),
}
COMPILED_EXACT = ExactArithmetic(compiled=True)


class _Round(torch.autograd.Function):
    """Rounding to whole numbers with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Advance(torch.autograd.Function):
    """`advance_` for back-propagation through time: the same bits forward, the linear recurrence backward."""

    @staticmethod
    def forward(
        ctx: Any,
        arithmetic: AbstractArithmetic,
        recurrence: Recurrence,
        previous: Tensor,
        current: Tensor,
        value: Tensor,
    ) -> Tensor:
        ctx.recurrence, ctx.scale, ctx.value_dtype = recurrence, arithmetic.scale, value.dtype
        return arithmetic.advance_(previous.clone(), current, value, recurrence)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        a, c, b = ctx.recurrence
        return None, None, float(a) * grad, c * grad, (b * ctx.scale * grad).to(ctx.value_dtype)


def advance_with_gradient(
    arithmetic: AbstractArithmetic, previous: Tensor, current: Tensor, value: Tensor, recurrence: Recurrence
) -> Tensor:
    """Next state as `advance_` makes it, differentiable by autograd; nothing is overwritten."""
    return _Advance.apply(arithmetic, recurrence, previous, current, value)  # type: ignore[no-any-return]


def _round(x: Tensor) -> Tensor:
    return _Round.apply(x)  # type: ignore[no-any-return]
