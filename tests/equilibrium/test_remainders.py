"""The exact state against Python's integers, which can neither round nor overflow."""

import contextlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st

from revdeq_lightning.equilibrium import MomentumSolver, ReversibleSolver
from revdeq_lightning.equilibrium.exact.arithmetic import ExactArithmetic, Recurrence
from revdeq_lightning.equilibrium.exact.remainders import Remainders
from revdeq_lightning.equilibrium.loop import DivergenceError
from revdeq_lightning.equilibrium.solvers.reversible import MAX_DENOMINATOR
from tests.helpers.equilibrium import BPTT, REVERSIBLE, refuses, solve

SEEDS = st.integers(0, 2**31 - 1)
radices = st.one_of(st.integers(2, 17), st.integers(2, MAX_DENOMINATOR))
both_widths = pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])


@st.composite
def fractions(draw):
    denominator = draw(radices)
    return Fraction(draw(st.integers(1, denominator - 1)), denominator) * draw(st.sampled_from([1, -1]))


@given(radix=radices, num_digits=st.integers(1, 70), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_digits_come_back_in_reverse_order(radix, num_digits, seed):
    generator = torch.Generator().manual_seed(seed)
    stack, width = Remainders.empty(radix), math.ceil(math.log2(radix))
    pushed = []
    for k in range(num_digits):
        pushed.append(torch.randint(radix, (3, 4), generator=generator, dtype=torch.int32))
        pushed[-1][0, :2] = torch.tensor([radix - 1, 0])
        stack.push(pushed[-1].clone())
        assert sum(row.numel() for row in stack.rows) == 12 * math.ceil(width * (k + 1) / 8)
    for digits in reversed(pushed):
        assert torch.equal(stack.pop().to(torch.int32), digits)
    assert stack.count == 0
    assert not stack.rows


def test_fields_of_bits_cost_at_most_three_tenths_more_than_exactness_needs():
    for radix in (2, 3, 5, 9, 17):
        stack = Remainders.empty(radix)
        for num_digits in range(1, 129):
            stack.push(torch.zeros(1, dtype=torch.int32))
            bits = 8 * len(stack.rows)
            assert bits <= 1.3 * num_digits * math.log2(radix) + 7  # the last byte need not be full
            assert bits <= 1.35 * num_digits * math.log2(radix) or num_digits < 54


@both_widths
def test_every_update_is_a_bijection_with_digits_in_radix_q_over_p(wide):
    """Every a = p / q up to q = 16, and every state of a few bits; the oracle is Python's floor division."""
    states = torch.arange(-70, 71, dtype=torch.int32)
    zero = torch.zeros(len(states))
    for a in {Fraction(sign * p, q) for q in range(2, 17) for p in range(1, q) for sign in (1, -1)}:
        p, q = abs(a.numerator), a.denominator
        exact = ExactArithmetic(Recurrence(a, 0.0, 1.0), wide=wide)
        kept, u = exact.remainders(), states.to(exact.dtype)
        following = exact.advance(u, u, zero, kept)
        quotients = [p * n // q for n in states.tolist()]
        assert following.tolist() == [math.copysign(1, a) * quotient for quotient in quotients]
        assert torch.equal(exact.invert_(following.clone(), u, zero, kept), u)
        kept = exact.remainders()
        exact.advance(u, u, zero, kept)
        digits = kept.pop().tolist()
        assert set(digits) == set(range(math.ceil(q / p)))  # each is needed, and there is no other
        assert len(set(zip(quotients, digits, strict=True))) == len(states)


def _integers(tensor):
    return [int(u) for u in tensor.tolist()]


def _random_states(limit, seed, dtype, num_elements=64):
    """Whole numbers of magnitude up to `limit`, the extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(2):
        random = torch.randint(-limit, limit + 1, (num_elements,), generator=generator)
        random[:4] = torch.tensor([limit, -limit, 0, -1])
        states.append(random.to(dtype))
    return states


@both_widths
@given(a=fractions(), c=st.floats(-2, 2), b=st.floats(-2, 2), share=st.floats(0, 1), seed=SEEDS)
@settings(max_examples=50, deadline=None)
def test_update_equals_integer_arithmetic(wide, a, c, b, share, seed):
    exact = ExactArithmetic(Recurrence(a, c, b), wide=wide)
    limit = int(exact.limit() * exact.scale)
    previous, current = _random_states(int(limit * share), seed, exact.dtype)
    value = torch.randn(len(previous), generator=torch.Generator().manual_seed(seed))
    following = exact.advance(previous, current, value)
    # Two products and their sum are rounded, to a precision of 2^-24 or 2^-53, and the sum to a whole number.
    eps = torch.finfo(exact.compute_dtype).eps
    for u_before, u, f, u_next in zip(
        *map(_integers, (previous, current)), value.tolist(), _integers(following), strict=True
    ):
        terms = Fraction(c) * u, Fraction(b) * Fraction(f) * int(exact.scale)
        quotient = math.floor(Fraction(abs(a) * u_before))
        exactly = (quotient if a > 0 else -quotient) + sum(terms)
        error = 0.5 + 2 * eps * (abs(terms[0]) + abs(terms[1])) + 1e-9
        overflows = max(abs(exactly), abs(sum(terms))) > 2**31 - error
        assert abs(u_next - exactly) <= error or (overflows and abs(u_next) >= limit)


@both_widths
@given(a=fractions(), share=st.floats(0, 1), steps=st.integers(1, 60), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_inverse_returns_the_same_bits(wide, a, share, steps, seed):
    _assert_round_trip(wide, a, share, steps, seed)


@both_widths
def test_inverse_where_a_rounded_reciprocal_misleads(wide):
    """49 * (1 / 49) < 1 in float64: floor(49 * (1 / 49)) is 0."""
    for n in (49, 98, 103, 107, 161, 187, 197, 4095):
        for a in (Fraction(1, n), Fraction(-(n - 1), n), Fraction(49, max(50, n))):
            _assert_round_trip(wide, a, 1e-9, 20, 0)
            _assert_round_trip(wide, a, 0.999, 20, 0)


def _assert_round_trip(wide, a, share, steps, seed):
    """c = 0 and values that keep the states, which start there, below a share of the limit."""
    exact = ExactArithmetic(Recurrence(a, 0.0, 1.0), wide=wide)
    limit = int(exact.limit() * exact.scale * share)
    previous, current = _random_states(limit, seed, exact.dtype)
    start = previous.clone(), current.clone()
    generator = torch.Generator().manual_seed(seed)
    amplitude = (1 - abs(float(a))) * max(limit - 2, 0) / exact.scale
    stack, values = exact.remainders(), []
    for _ in range(steps):
        random = 2 * torch.rand(len(current), generator=generator, dtype=torch.float64) - 1
        values.append((random * amplitude * (1 - 1e-6)).to(exact.compute_dtype))
        before = _integers(previous)
        following = exact.advance(previous, current, values[-1], stack)
        for u_before, f, u_next in zip(before, values[-1].tolist(), _integers(following), strict=True):
            quotient = abs(a.numerator) * u_before // a.denominator
            assert u_next == round(f * exact.scale) + (quotient if a > 0 else -quotient)
        previous, current = current, following
    for value in reversed(values):
        previous, current = exact.invert_(current, previous, value, stack), previous
    assert torch.equal(previous, start[0])
    assert torch.equal(current, start[1])


@pytest.mark.parametrize(
    "solver",
    [
        ReversibleSolver(beta=0.8, max_steps=3),
        ReversibleSolver(beta=1.9, max_steps=3),
        MomentumSolver(max_steps=6),
        MomentumSolver(beta=0.1, momentum=0.9, max_steps=6),
        MomentumSolver(beta=1.9, momentum=-0.9, max_steps=6),
    ],
)
def test_overflow_never_passes_silently(solver):
    """The first evaluation that leaves the range is named: by the iteration in Python's integers."""
    generator, named = torch.Generator().manual_seed(0), set()
    exact = solver.state_arithmetic([torch.float32])
    (a, c, b), limit = solver.recurrence, exact.limit() * exact.scale
    for size in (0.1, 0.2, 0.3, 0.6, 1.0, 1.0, 1.5, 3.0, 1e3, 1e30):
        z0 = 0.99 * min(size, 1) * exact.limit() * torch.ones(1, 40)
        values = min(size, 1) * exact.limit() * (2 * torch.rand((6, 40), generator=generator) - 1).sign()
        values *= torch.rand((6, 40), generator=generator) ** 0.1
        values[torch.rand((6, 40), generator=generator) < 0.01] *= max(size, 1)
        first, before = None, [round(z * exact.scale) for z in z0[0].tolist()]
        now = before
        for k, row in enumerate(values.tolist(), 1):
            quotients = [math.copysign(1, a) * (abs(a.numerator) * u // a.denominator) for u in before]
            terms = zip(quotients, now, row, strict=True)
            before, now = now, [round(h + c * u + b * v * exact.scale) for h, u, v in terms]
            if first is None and max(map(abs, (*now, *(v * exact.scale for v in row)))) >= limit:
                first = k
        for adjoint in (REVERSIBLE, BPTT):
            rest = iter(values)
            expected = refuses(DivergenceError, f"after {first} eval") if first else contextlib.nullcontext()
            with expected:
                solve(lambda z, x, rest=rest: next(rest)[None] + 0 * z, None, solver, adjoint, z0.requires_grad_())
        named.add(first)
    assert len(named) > 1
