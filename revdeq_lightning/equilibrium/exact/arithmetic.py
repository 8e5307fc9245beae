"""How a state of the two-step recurrence is held and updated.

    u_{k+1} = a * u_{k-1} + c * u_k + b * v,      v = f(u_k, x),      a + b + c = 1

In floating point every inverse step divides a rounding error by `a`, so the reconstruction goes wrong at depth. The
default is `ExactArithmetic`: whole numbers and remainders, whose inverse returns the same bits at any depth.
"""

import abc
from ctypes import c_float
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...transforms import has_numbers, is_transformed
from .remainders import Remainders

Kept = Remainders | None
"""What the updates destroy; None where nothing is kept, and no update is to be undone."""
Decoded = Tensor | None
"""u_k as f saw it, if it is at hand."""

FRACTION_BITS = {torch.int32: 21, torch.float64: 32}
"""States are whole numbers in units of 2 to minus this."""


class Recurrence(NamedTuple):
    """Coefficients of `u_{k+1} = a * u_{k-1} + c * u_k + b * f(u_k)`."""

    a: Fraction
    c: float
    b: float

    def rounded(self, dtype: torch.dtype) -> tuple[float, float, float]:
        """The coefficients in a floating-point dtype, with the sum 1: else a gradient drifts over many evaluations."""
        c, b = (number if dtype == torch.float64 else c_float(number).value for number in (self.c, self.b))
        return 1 - b - c, c, b


def kernels_for(tensor: Tensor, dtype: torch.dtype) -> Any:
    """The module `kernels` if they can work on this tensor of this dtype, otherwise None."""
    if not tensor.is_cuda or tensor.dtype != dtype or not has_numbers(tensor) or find_spec("triton") is None:
        return None
    return import_module(".kernels", __package__)


class AbstractArithmetic(abc.ABC):
    """Representation of one tensor of the state, with the update and its inverse.

    All methods return new memory and overwrite nothing, except `invert_`.
    """

    dtype: torch.dtype
    differentiable_dtype: torch.dtype
    """Of states that carry a gradient: it holds every number of `dtype`."""
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
    def advance(self, u_before: Tensor, u: Tensor, v: Tensor, kept: Kept = None, z: Decoded = None) -> Tensor:
        """u_{k+1} from u_{k-1}, u_k and v."""

    def advance_detached(self, u_before: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """As `advance`, for states of the differentiable dtype, without their gradient."""
        return self.advance(u_before.to(self.dtype), u.to(self.dtype), v).to(self.differentiable_dtype)

    def advance_transformed(self, u_before: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """As `AdvanceWithGradient`, of operations that `torch.func` knows: the derivative is added as a zero."""
        a, c, b = self.recurrence
        linear = float(a) * u_before + c * u + (b * self.scale) * v.to(self.differentiable_dtype)
        following = self.advance_detached(u_before.detach(), u.detach(), v.detach())
        return following + (linear - linear.detach())

    @abc.abstractmethod
    def invert_(self, u_next: Tensor, u: Tensor, v: Tensor, kept: Kept = None) -> Tensor:
        """u_{k-1} from u_{k+1}, u_k and v, in the memory of `u_next`."""

    def limit(self) -> float:
        """Magnitude that every state and every value of f must stay below."""
        return float("inf")

    def remainders(self) -> Kept:
        """Empty storage for what the updates of a state destroy."""
        return None


class ExactArithmetic(AbstractArithmetic):
    """States are whole numbers `U = round(scale * u)`; the update is invertible bit for bit.

    With `a = sign * p / q`, p > 0:

        h = floor(p * U_{k-1} / q),    d = U_{k-1} - ceil(q * h / p)                 d is kept
        U_{k+1} = sign * h + g,        g = round(scale * (c * u_k + b * v))

    The inverse is `h = sign * (U_{k+1} - g)`, `U_{k-1} = ceil(q * h / p) + d`. At most ceil(q / p) whole numbers U have
    the same h, one after the other: d is a digit in radix ceil(q / p). On average an update destroys log2(q / p) bits.

    Two representations, by the dtype of the state that f sees:

    * int32, in units of 2^-21, where f computes in float32 or less. Its range is some 1,000; beyond it sums of integers
      wrap around, but not back into the range (see `limit`), so that this does not pass silently.
    * float64 that holds whole numbers, in units of 2^-32, for f in float64 and for larger states: exact while
      `max(p, q) * |U| < 2^51`. Not int64, whose products and quotients do not vectorize on CPUs.

    Two products and their sum are rounded on the way to g, each for itself: a fused multiply-add would differ.
    """

    differentiable_dtype = torch.float64

    def __init__(self, recurrence: Recurrence, *, wide: bool) -> None:
        super().__init__(recurrence)
        self.dtype, self.compute_dtype = (torch.float64,) * 2 if wide else (torch.int32, torch.float32)
        self.scale = 2.0 ** FRACTION_BITS[self.dtype]
        self.p, self.q = abs(recurrence.a.numerator), recurrence.a.denominator
        self.sign = 1 if recurrence.a > 0 else -1

    def encode(self, u: Tensor) -> Tensor:
        if is_transformed() or (torch.is_grad_enabled() and u.requires_grad):
            scaled = u.to(torch.float64) * self.scale
            return scaled.detach().round() + (scaled - scaled.detach())  # rounded, with the derivative of the scaling
        return u.to(self.compute_dtype, copy=True).mul_(self.scale).round_().to(self.dtype)

    def advance(self, u_before: Tensor, u: Tensor, v: Tensor, kept: Kept = None, z: Decoded = None) -> Tensor:
        quotient = self._multiple(u_before, self.p, self.q)
        if kept is not None:
            kept.push(u_before if self._is_shift(self.p, self.q) else u_before - self._least(quotient))
        return self._increment(u, v, z).add_(quotient, alpha=self.sign)

    def invert_(self, u_next: Tensor, u: Tensor, v: Tensor, kept: Kept = None) -> Tensor:
        assert kept is not None, "the exact state is invertible only with its remainders"
        increment, quotient = self._increment(u, v), u_next
        if self.sign > 0:
            quotient.sub_(increment)
        else:
            torch.sub(increment, u_next, out=quotient)
        return self._least(quotient, out=u_next).add_(kept.pop())

    def _least(self, quotient: Tensor, out: Tensor | None = None) -> Tensor:
        """The least U with `floor(p * U / q) = quotient`, which is `ceil(q * quotient / p)`."""
        return self._multiple(quotient, self.q, self.p, up=True, out=out)

    def _increment(self, u: Tensor, v: Tensor, z: Decoded = None) -> Tensor:
        """`round(scale * (c * u_k + b * v))`: depends on u_k alone, so that both directions get the same bits."""
        _, c, b = self.recurrence
        increment = v.to(self.compute_dtype) * (b * self.scale)
        if c:  # every operation rounded for itself, as in the kernels; scaling by a power of 2 is exact
            if z is not None and z.dtype == self.compute_dtype:
                increment.add_(z * (c * self.scale))
            else:
                increment.add_(u.to(self.compute_dtype, copy=True).mul_(c))
        return increment.round_().to(self.dtype)

    def _is_shift(self, numerator: int, denominator: int) -> bool:
        """Whether `floor(whole * numerator / denominator)` drops the last bits of `whole`, and nothing else."""
        return numerator == 1 and self.dtype == torch.int32 and denominator & (denominator - 1) == 0

    def _multiple(
        self, whole: Tensor, numerator: int, denominator: int, *, up: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """`floor(whole * numerator / denominator)`, or its ceiling."""
        if denominator == 1:
            return whole * numerator if out is None else torch.mul(whole, numerator, out=out)
        if self._is_shift(numerator, denominator):
            return whole >> (denominator.bit_length() - 1)
        # Half a unit away from every whole number, so that the rounding of 1 / denominator does not matter.
        offset = denominator - 0.5 if up else 0.5
        multiple = whole.to(torch.float64) * numerator if numerator != 1 else whole.to(torch.float64, copy=True)
        multiple.add_(offset).mul_(1 / denominator).floor_()
        return multiple.to(self.dtype) if out is None else out.copy_(multiple)

    def limit(self) -> float:
        a, c, b = self.recurrence
        if self.dtype == torch.float64:
            return 2.0**51 / self.scale / max(self.p, self.q)
        # If all states and values so far are below it, the next state may wrap around, but only to one above it.
        return (1 - 2.0**-20) * 2.0**32 / self.scale / (1 + abs(float(a)) + abs(c) + abs(b))

    def remainders(self) -> Remainders:
        return Remainders.empty(-(-self.q // self.p))


class FloatArithmetic(AbstractArithmetic):
    """States are floating-point numbers, float64 as published or float32: reversible only up to rounding.

    The reconstruction error grows by 1 / |a| or more per evaluation: see `benchmarks/` before you trust a gradient.
    """

    def __init__(self, recurrence: Recurrence, dtype: torch.dtype) -> None:
        super().__init__(recurrence)
        self.dtype = self.differentiable_dtype = dtype

    def advance(self, u_before: Tensor, u: Tensor, v: Tensor, kept: Kept = None, z: Decoded = None) -> Tensor:
        a, c, b = self.recurrence
        following = (float(a) * u_before).add_(v.to(self.dtype), alpha=b)
        return following.add_(u, alpha=c) if c else following

    def invert_(self, u_next: Tensor, u: Tensor, v: Tensor, kept: Kept = None) -> Tensor:
        a, c, b = self.recurrence
        u_next.sub_(v.to(self.dtype), alpha=b)
        return (u_next.sub_(u, alpha=c) if c else u_next).div_(float(a))


class AdvanceWithGradient(torch.autograd.Function):
    """The bits of `advance` with the linear recurrence's gradient, for BPTT."""

    @staticmethod
    def forward(ctx: Any, arithmetic: AbstractArithmetic, u_before: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.recurrence, ctx.scale, ctx.dtype = arithmetic.recurrence, arithmetic.scale, v.dtype
        return arithmetic.advance_detached(u_before, u, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        a, c, b = ctx.recurrence
        return None, float(a) * grad, c * grad, (b * ctx.scale * grad).to(ctx.dtype)
