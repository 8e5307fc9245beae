"""The exact state against Python's integers, which cannot round."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from revdeq_lightning.equilibrium.exact.arithmetic import ExactArithmetic, Recurrence
from revdeq_lightning.equilibrium.exact.remainders import WORD_LIMIT, Remainders, digits_per_group, most_digits
from revdeq_lightning.equilibrium.solvers.reversible import MAX_DENOMINATOR

SEEDS = st.integers(0, 2**31 - 1)
radices = st.one_of(st.integers(2, 16), st.integers(2, MAX_DENOMINATOR))


class ReciprocalDivision(TorchDispatchMode):
    """Divides by a number as CUDA kernels do, by multiplying with its rounded reciprocal."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        products = {
            aten.div.Tensor: aten.mul.Tensor,
            aten.div_.Tensor: aten.mul_.Tensor,
            aten.div.out: aten.mul.out,
        }
        if func in products:
            a, b = args
            if isinstance(b, int | float):
                return products[func](a, 1.0 / b, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@st.composite
def fractions(draw):
    denominator = draw(radices)
    return Fraction(draw(st.integers(1, denominator - 1)), denominator) * draw(st.sampled_from([1, -1]))


@given(radix=radices, num_digits=st.integers(1, 130), masked=st.booleans(), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_digits_come_back_in_reverse_order(radix, num_digits, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, 2)
    stack = Remainders.empty(torch.zeros(shape, dtype=torch.float64), radix)
    pushed = []
    for _ in range(num_digits):
        digits = torch.randint(radix, shape, generator=generator).double()
        digits[0, 0, 0] = radix - 1  # the largest number that a word can meet
        active = torch.rand(shape[0], generator=generator) < 0.6 if masked else None
        pushed.append((digits.clone(), active))
        stack.push_(digits, active)
    per_word, (per_group, _) = most_digits(radix, WORD_LIMIT), digits_per_group(radix)
    assert len(stack.spilled) == sum(
        max(0, math.ceil((n - per_word) / per_group)) for n in (num_digits // 2, num_digits - num_digits // 2)
    )
    for digits, active in reversed(pushed):
        expected = digits if active is None else digits * active.view(-1, 1, 1)
        assert torch.equal(stack.pop_(active), expected)
    assert stack.count == 0
    assert not stack.spilled
    assert all(not word.any() for word in stack.words)


@given(radix=radices)
def test_a_full_word_is_a_whole_number_of_float64(radix):
    digits = most_digits(radix, WORD_LIMIT)
    assert radix**digits <= 2**52 < radix ** (digits + 1)


@given(radix=radices)
def test_a_group_of_digits_fits_its_integer(radix):
    digits, dtype = digits_per_group(radix)
    assert radix**digits <= torch.iinfo(dtype).max + 1
    assert digits < most_digits(radix, WORD_LIMIT)


@pytest.mark.parametrize("radix", [2, 3, 5, 7, 8, 10, 16, 20, 25, 100])
def test_a_group_of_digits_wastes_at_most_a_fifth(radix):
    digits, dtype = digits_per_group(radix)
    assert 8 * dtype.itemsize <= 1.25 * digits * math.log2(radix)


def _integers(tensor):
    return [int(u) for u in tensor.tolist()]


@given(a=fractions(), c=st.floats(-2, 2), b=st.floats(-2, 2), share=st.floats(0, 1), seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_update_equals_integer_arithmetic(a, c, b, share, seed):
    exact = ExactArithmetic(Recurrence(a, c, b))
    limit = int(exact.limit() * 2**32 * share)
    previous, current = _random_states(limit, seed)
    value = torch.randn(len(previous), generator=torch.Generator().manual_seed(seed))
    following = exact.advance_(previous.clone(), current, value)
    for u_before, u, f, u_next in zip(
        *map(_integers, (previous, current)), value.tolist(), _integers(following), strict=True
    ):
        # Python's float is the same float64; a fused multiply-add in the kernel moves the increment by one at most.
        increment = round(c * u + f * (b * 2.0**32))
        assert abs(u_next - (a.numerator * u_before // a.denominator + increment)) <= 1


def _random_states(limit, seed, num_elements=64):
    """Whole numbers of magnitude up to `limit`, the extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(2):
        random = torch.randint(-limit, limit + 1, (num_elements,), generator=generator)
        random[:4] = torch.tensor([limit, -limit, 0, -1])
        states.append(random.double())
    return states


@pytest.mark.parametrize("division", ["true", "reciprocal"])
@given(a=fractions(), share=st.floats(0, 1), steps=st.integers(1, 60), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_inverse_returns_the_same_bits(division, a, share, steps, seed):
    """c = 0 and a value that cancels the increase: so the states may start at the limit and stay below it."""
    _assert_round_trip(a, share, steps, seed, reciprocal=division == "reciprocal")


@pytest.mark.parametrize("division", ["true", "reciprocal"])
@pytest.mark.parametrize("denominator", [49, 98, 100, 103, 107, 161, 187, 197, 206, 4095])
def test_inverse_where_a_rounded_reciprocal_misleads(denominator, division):
    """49 * (1 / 49) < 1 in float64: floor(49 * (1 / 49)) is 0."""
    for a in (Fraction(1, denominator), Fraction(-(denominator - 1), denominator), Fraction(49, max(50, denominator))):
        _assert_round_trip(a, 1e-9, 40, 0, reciprocal=division == "reciprocal")
        _assert_round_trip(a, 0.999, 40, 0, reciprocal=division == "reciprocal")


def _assert_round_trip(a, share, steps, seed, *, reciprocal):
    exact = ExactArithmetic(Recurrence(a, 0.0, 1.0))
    # The state stays below a share of the limit: |a| u + (1 - |a|) u <= u.
    limit = int(exact.limit() * 2**32 * share)
    previous, current = _random_states(limit, seed)
    start = previous.clone(), current.clone()
    generator = torch.Generator().manual_seed(seed)
    amplitude = (1 - abs(float(a))) * max(limit - 2, 0) / 2**32
    stack = Remainders.empty(current, a.denominator)
    values = []
    mode = ReciprocalDivision() if reciprocal else torch.no_grad()
    with mode:
        for _ in range(steps):
            values.append((2 * torch.rand(len(current), generator=generator, dtype=torch.float64) - 1) * amplitude)
            before = _integers(previous)
            following = exact.advance_(previous, current, values[-1], stack)
            for u_before, f, u_next in zip(before, values[-1].tolist(), _integers(following), strict=True):
                assert u_next == a.numerator * u_before // a.denominator + round(f * 2.0**32)
            previous, current = current, following
        for value in reversed(values):
            before = exact.invert_(current, previous, value, stack)
            previous, current = before, previous
    assert torch.equal(previous, start[0])
    assert torch.equal(current, start[1])
