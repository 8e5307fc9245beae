"""How a state of the two-step recurrence is held and updated.

    u_{k+1} = a * u_{k-1} + c * u_k + b * v,      v = f(u_k, x),      a + b + c = 1

In floating point every inverse step divides a rounding error by `a`, so the reconstruction goes wrong at depth. The
default is `ExactArithmetic`: whole numbers and remainders, whose inverse returns the same bits at any depth.
"""

import abc
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...transforms import is_transformed
from ..norms import Mask
from . import kernels
from .remainders import Remainders, divisor

Kept = Remainders | None
"""What the updates destroy; None where nothing is kept, and no update is to be undone."""


class Recurrence(NamedTuple):
    """Coefficients of `u_{k+1} = a * u_{k-1} + c * u_k + b * f(u_k)`."""

    a: Fraction
    c: float
    b: float


class AbstractArithmetic(abc.ABC):
    """Representation of one tensor of the state, with the update and its inverse.

    Methods that end in an underscore overwrite their first argument; `encode` and `decode` return new memory.
    """

    dtype: torch.dtype
    scale = 1.0
    """Size of 1.0 in the representation."""

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence

    def encode(self, u: Tensor) -> Tensor:
        """Represent a tensor; the derivative is that of the scaling."""
        return u.to(self.dtype, copy=True)

    def decode(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor that a state represents."""
        # Scaling by a power of 2 commutes with rounding: convert first, and scale the smaller tensor.
        wide = torch.promote_types(dtype, torch.float32)
        return state.to(wide, copy=True).mul_(1 / self.scale).to(dtype)

    @abc.abstractmethod
    def advance_(self, u_before: Tensor, u: Tensor, v: Tensor, kept: Kept = None, active: Mask = None) -> Tensor:
        """u_{k+1} from u_{k-1}, u_k and v, in the memory of `u_before`."""

    def advance_transformed(self, u_before: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """As `AdvanceWithGradient`, of operations that `torch.func` knows: the derivative is added as a zero."""
        a, c, b = self.recurrence
        linear = float(a) * u_before + c * u + (b * self.scale) * v.to(self.dtype)
        following = self.advance_(u_before.detach() + torch.zeros_like(linear), u.detach(), v.detach())
        return following + (linear - linear.detach())

    @abc.abstractmethod
    def invert_(self, u_next: Tensor, u: Tensor, v: Tensor, kept: Kept = None, active: Mask = None) -> Tensor:
        """u_{k-1} from u_{k+1}, u_k and v, in the memory of `u_next`."""

    def limit(self) -> float:
        """Magnitude that a state must stay below."""
        return float("inf")

    def remainders(self, state: Tensor) -> Kept:
        """Empty storage for what the updates of `state` destroy."""
        return None


class ExactArithmetic(AbstractArithmetic):
    """States are whole numbers `U = round(2^32 * u)` in float64; the update is invertible bit for bit.

    With `a = p / q`:

        t = p * U_{k-1},  s = floor(t / q),  r = t - q * s,  U_{k+1} = s + g,  g = round(2^32 * (c * u_k + b * v))

    The inverse `U_{k-1} = (q * (U_{k+1} - g) + r) / p` is an exact division.

    An update destroys log2(q / |p|) bits per element, on average over states. The whole remainder `r` in [0, q) is
    kept, log2(q) bits: exactly what is destroyed where |p| = 1 (beta 0.5 or 0.8, momentum 1/8), and more elsewhere,
    because `t = q * s + r` is a multiple of p. A digit in radix ceil(q / |p|) would be enough.

    All is exact while `max(|p|, q) * |U| < 2^52`: one bit less than float64 holds, so that the rounded quotient never
    reaches the next whole number. float64 rather than int64, because integer division does not vectorize on CPUs.

    With `compiled` the updates are compiled, except with a tolerance, where samples stop one by one.
    """

    dtype = torch.float64
    scale = 2.0**32

    def __init__(self, recurrence: Recurrence, *, compiled: bool = False) -> None:
        super().__init__(recurrence)
        self.compiled = compiled
        self.p, self.q = recurrence.a.numerator, recurrence.a.denominator
        self.coefficients = self.p, self.q, recurrence.c, recurrence.b * self.scale

    def encode(self, u: Tensor) -> Tensor:
        if is_transformed() or (torch.is_grad_enabled() and u.requires_grad):
            scaled = u.to(torch.float64) * self.scale
            return scaled.detach().round() + (scaled - scaled.detach())  # rounded, with the derivative of the scaling
        return u.to(torch.float64, copy=True).mul_(self.scale).round_()

    def advance_(self, u_before: Tensor, u: Tensor, v: Tensor, kept: Kept = None, active: Mask = None) -> Tensor:
        if self.compiled and kept is not None and active is None:
            kernels.run(kernels.advance_, u_before, u, v, kept.begin_push(), *self.coefficients)
            return u_before
        if self.p != 1:
            u_before.mul_(self.p)
        quotient = torch.div(u_before, divisor(self.q, u_before), out=None if kept is None else kept.scratch).floor_()
        if kept is not None:
            kept.push_(u_before.sub_(quotient, alpha=self.q), active)
        return self._increment(u, v, out=u_before).add_(quotient)

    def invert_(self, u_next: Tensor, u: Tensor, v: Tensor, kept: Kept = None, active: Mask = None) -> Tensor:
        assert kept is not None, "the exact state is invertible only with its remainders"
        if self.compiled and active is None:
            word = kept.words[kept.begin_pop()]
            kernels.run(kernels.invert_, u_next, u, v, word, *self.coefficients)
            kept.end_pop()
            return u_next
        u_next.sub_(self._increment(u, v, out=kept.scratch))
        torch.add(kept.pop_(active), u_next, alpha=self.q, out=u_next)
        return u_next if self.p == 1 else u_next.div_(divisor(self.p, u_next))

    def _increment(self, u: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """`round(2^32 * (c * u_k + b * v))`: depends on u_k alone, so that both directions get the same bits."""
        _, _, c, b = self.coefficients
        increment = out.copy_(v).mul_(b)
        return (increment.add_(u, alpha=c) if c else increment).round_()

    def limit(self) -> float:
        return 2.0**52 / self.scale / max(abs(self.p), self.q)

    def remainders(self, state: Tensor) -> Remainders:
        return Remainders.empty(state, self.q)


class FloatArithmetic(AbstractArithmetic):
    """States are floating-point numbers, float64 as published or float32: reversible only up to rounding.

    The reconstruction error grows by 1 / |a| or more per evaluation: see `benchmarks/` before you trust a gradient.
    """

    def __init__(self, recurrence: Recurrence, dtype: torch.dtype) -> None:
        super().__init__(recurrence)
        self.dtype = dtype

    def advance_(self, u_before: Tensor, u: Tensor, v: Tensor, kept: Kept = None, active: Mask = None) -> Tensor:
        a, c, b = self.recurrence
        u_before.mul_(float(a)).add_(v.to(self.dtype), alpha=b)
        return u_before.add_(u, alpha=c) if c else u_before

    def invert_(self, u_next: Tensor, u: Tensor, v: Tensor, kept: Kept = None, active: Mask = None) -> Tensor:
        a, c, b = self.recurrence
        u_next.sub_(v.to(self.dtype), alpha=b)
        return (u_next.sub_(u, alpha=c) if c else u_next).div_(float(a))


class AdvanceWithGradient(torch.autograd.Function):
    """The bits of `advance_` with the linear recurrence's gradient, for BPTT; overwrites nothing."""

    @staticmethod
    def forward(ctx: Any, arithmetic: AbstractArithmetic, u_before: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.recurrence, ctx.scale, ctx.dtype = arithmetic.recurrence, arithmetic.scale, v.dtype
        return arithmetic.advance_(u_before.clone(), u, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        a, c, b = ctx.recurrence
        return None, float(a) * grad, c * grad, (b * ctx.scale * grad).to(ctx.dtype)
