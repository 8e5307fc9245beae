"""The updates of 32-bit states on CUDA: one Triton kernel forward, one for the inverse, one for the gradient.

Each has the bits of its twin in plain PyTorch (`ExactArithmetic`), which serves everywhere else: integers throughout,
and no fused multiply-add. Tensors are read in the order of the state's memory. A value of f or a gradient of images may
be channels first where the state is `channels_last`, or the converse: the kernels read it as it is; anything else is
copied first. An element and pair of passes moves 60 bytes, 20 in each kernel (12 read, 8 written), and at most 8 for
its digits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import ExactArithmetic
from .remainders import Remainders

BLOCK = 1024


@triton.jit
def _place(i, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    """Where element i of the state is in a tensor of which each sample is a transposed matrix of ROWS x COLUMNS."""
    if ROWS > 1:
        within = i % (ROWS * COLUMNS)
        i = i - within + (within % COLUMNS) * ROWS + within // COLUMNS
    return i


@triton.jit
def _increment(u, v, scaled_b, c, HAS_C: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    x = v * scaled_b
    if HAS_C:
        x = x + u.to(tl.float32) * c
    # To the nearest even: where it has a fraction it is below 2^23, and sums from there to 2^24 have none.
    size = tl.abs(x)
    rounded = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -rounded, rounded).to(tl.int32)


@triton.jit
def advance_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    before, now, value, following, iterate, largest, row0, row1, row2, n, offset, scaled_b, c,
    P: tl.constexpr, Q: tl.constexpr, SIGN: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    HAS_C: tl.constexpr, KEEPS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The next state, its iterate, its digits, and the largest magnitude."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    u_before = tl.load(before + i, m, 0)
    v = tl.load(value + _place(i, ROWS, COLUMNS), m, 0.0).to(tl.float32)
    h = u_before // Q  # truncated or not
    rest = u_before - h * Q
    h = tl.where(rest < 0, h - 1, h)
    rest = tl.where(rest < 0, rest + Q, rest)
    e = (rest * P) // Q  # floor(P * U / Q) = P * h + e: no product overflows
    u = _increment(tl.load(now + i, m, 0), v, scaled_b, c, HAS_C) + SIGN * (P * h + e)
    tl.store(following + i, u, m)
    tl.store(iterate + i, u.to(tl.float32) * UNIT, m)
    if KEEPS:
        word = (rest - (Q * e + P - 1) // P) << offset
        if offset > 0:
            word = word | tl.load(row0 + i, m, 0).to(tl.int32)
        tl.store(row0 + i, (word & 255).to(tl.uint8), m)
        if offset + WIDTH > 8:
            tl.store(row1 + i, ((word >> 8) & 255).to(tl.uint8), m)
        if offset + WIDTH > 16:
            tl.store(row2 + i, (word >> 16).to(tl.uint8), m)
    # The bits of numbers that are not negative are ordered as they are, and NaN is above all.
    seen = tl.maximum(tl.abs(v).to(tl.int32, bitcast=True), tl.abs(u.to(tl.float32) * UNIT).to(tl.int32, bitcast=True))
    tl.atomic_max(largest, tl.max(tl.where(m, seen, 0), 0))


@triton.jit
def invert_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    following, now, value, iterate, row0, row1, row2, n, offset, scaled_b, c,
    P: tl.constexpr, Q: tl.constexpr, SIGN: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    HAS_C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The state before, and its iterate."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    v = tl.load(value + _place(i, ROWS, COLUMNS), m, 0.0).to(tl.float32)
    g = _increment(tl.load(now + i, m, 0), v, scaled_b, c, HAS_C)
    word = tl.load(row0 + i, m, 0).to(tl.int32)
    if offset + WIDTH > 8:
        word = word | (tl.load(row1 + i, m, 0).to(tl.int32) << 8)
    if offset + WIDTH > 16:
        word = word | (tl.load(row2 + i, m, 0).to(tl.int32) << 16)
    digit = (word >> offset) & ((1 << WIDTH) - 1)
    quotient = SIGN * (tl.load(following + i, m, 0) - g)
    h = quotient // P
    e = quotient - h * P
    h = tl.where(e < 0, h - 1, h)
    e = tl.where(e < 0, e + P, e)
    u = h * Q + (Q * e + P - 1) // P + digit
    tl.store(following + i, u, m)
    tl.store(iterate + i, u.to(tl.float32) * UNIT, m)


@triton.jit
def carry_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    previous, current, product, n, a, c, b,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient back through one evaluation."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    g = tl.load(current + i, m, 0.0)
    w = tl.load(product + _place(i, ROWS, COLUMNS), m, 0.0).to(tl.float32)
    tl.store(previous + i, tl.load(previous + i, m, 0.0) + w * b + g * c, m)
    tl.store(current + i, g * a, m)


def advance(
    exact: ExactArithmetic, u_before: Tensor, u: Tensor, v: Tensor, kept: Remainders | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The next state, the iterate that it is for f, and the largest magnitude among it and v, 0-dim."""
    following, iterate = torch.empty_like(u_before), torch.empty_like(u_before, dtype=dtype)
    largest = torch.zeros(1, dtype=torch.int32, device=u.device)
    rows, offset = _rows(kept, u_before) if kept is not None else ([u] * 3, 0)
    v, order = _as_in(v, u_before)
    _launch(
        advance_kernel, u_before, u_before, _like(u, u_before), v, following, iterate, largest, *rows, u.numel(),
        offset, **_constants(exact), **order, WIDTH=kept.width if kept is not None else 1, KEEPS=kept is not None,
    )  # fmt: skip
    if kept is not None:
        kept.count += 1
    return following, iterate, largest.view(torch.float32)[0]


def invert_(
    exact: ExactArithmetic, u_next: Tensor, u: Tensor, v: Tensor, kept: Remainders, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The state before `u`, in the memory of `u_next`, and the iterate that it is for f."""
    iterate = torch.empty_like(u_next, dtype=dtype)
    kept.count -= 1
    rows, offset = _rows(kept, u_next)
    v, order = _as_in(v, u_next)
    _launch(
        invert_kernel, u_next, u_next, _like(u, u_next), v, iterate, *rows, u.numel(), offset,
        **_constants(exact), **order, WIDTH=kept.width,
    )  # fmt: skip
    kept.forget()
    return u_next, iterate


def carry_(previous: Tensor, current: Tensor, product: Tensor, a: float, c: float, b: float) -> None:
    """`previous` becomes `previous + b * product + c * current`, `current` becomes `a * current`."""
    product, order = _as_in(product, previous)
    _launch(carry_kernel, previous, previous, current, product, previous.numel(), a=a, c=c, b=b, **order)


def _rows(kept: Remainders, like: Tensor) -> tuple[list[Tensor], int]:
    """The rows of bytes that hold the digit at the top, new ones among them, and its first bit."""
    index, offset = kept.place(0)
    last = index + (offset + kept.width - 1) // 8
    while len(kept.rows) <= last:
        kept.rows.append(torch.empty_like(like, dtype=torch.uint8))
    return [kept.rows[min(index + j, last)] for j in range(3)], offset


def _like(tensor: Tensor, state: Tensor) -> Tensor:
    """The tensor with its elements in the order in which those of the state lie in memory."""
    return tensor if _is_like(tensor, state) else torch.empty_like(state, dtype=tensor.dtype).copy_(tensor)


def _as_in(tensor: Tensor, state: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The tensor, or a copy of it, and how the kernels find in it what is in one place with the state (`_place`)."""
    if tensor.ndim == 4 and not _is_like(tensor, state):
        channels, pixels = tensor.shape[1], tensor.shape[2] * tensor.shape[3]
        for own, other, rows in (((0, 2, 3, 1), (0, 1, 2, 3), channels), ((0, 1, 2, 3), (0, 2, 3, 1), pixels)):
            if tensor.permute(own).is_contiguous() and state.permute(other).is_contiguous():
                return tensor, {"ROWS": rows, "COLUMNS": channels * pixels // rows}
    return _like(tensor, state), {"ROWS": 1, "COLUMNS": 1}


def _is_like(tensor: Tensor, state: Tensor) -> bool:
    pairs = zip(tensor.shape, tensor.stride(), state.stride(), strict=True)
    return all(size == 1 or own == other for size, own, other in pairs)


def _constants(exact: ExactArithmetic) -> dict[str, Any]:
    _, c, b = exact.recurrence
    numbers = {"scaled_b": b * exact.scale, "c": c, "HAS_C": c != 0, "UNIT": 1 / exact.scale}
    return numbers | {"P": exact.p, "Q": exact.q, "SIGN": exact.sign}


def _launch(kernel: Any, state: Tensor, *arguments: Any, **options: Any) -> None:
    kernel[(triton.cdiv(state.numel(), BLOCK),)](*arguments, **options, BLOCK=BLOCK, enable_fp_fusion=False)
