"""Peak memory over depth, in bytes that tensors hold: whole numbers, the same in every repetition."""

import math

import pytest
import torch

from benchmarks.measure import peak_tensor_bytes
from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    solve_fixed_point,
)
from tests.helpers.equilibrium import AttentionBlock

TOKENS, DIM = 16, 16
ELEMENTS = TOKENS * DIM

RADIX = {"RevDEQ 0.8": 5, "RevDEQ 0.5": 2, "RevDEQ 0.7": 4, "RevDEQ 0.3": 2, "momentum 1/8": 8}
solvers = pytest.mark.parametrize("name", RADIX)


def make_solver(name, num_steps):
    if name == "momentum 1/8":
        return MomentumSolver(momentum=1 / 8, max_steps=num_steps)
    return ReversibleSolver(beta=float(name.split()[1]), max_steps=num_steps)


def peak_bytes(solver, adjoint=None):
    """Of a forward and a backward pass, with the gradient of every parameter, x and z0."""
    torch.manual_seed(0)
    f = AttentionBlock(DIM, 4)
    x, z0 = (torch.randn(1, TOKENS, DIM, requires_grad=True) for _ in range(2))
    weight = torch.ones(1, TOKENS, DIM)

    def run():
        value = solve_fixed_point(f, z0, x, solver=solver, adjoint=adjoint or ReversibleAdjoint()).value
        torch.autograd.grad(value, [z0, x, *f.parameters()], weight)

    return peak_tensor_bytes(run)


@pytest.fixture(autouse=True, scope="module")
def _warm():
    peak_bytes(ReversibleSolver(max_steps=1))


@solvers
def test_memory_grows_by_the_digits_alone(name):
    """Nothing but `ceil(log2(radix))` bits of an element and evaluation, in whole bytes."""
    per_step = make_solver(name, 1).evaluations_per_step
    at_four, bits = peak_bytes(make_solver(name, 4)), math.ceil(math.log2(RADIX[name]))
    for num_steps in (8, 60 // per_step):
        digits = [math.ceil(bits * n * per_step / 8) for n in (4, num_steps)]
        growth = peak_bytes(make_solver(name, num_steps)) - at_four
        assert abs(growth - ELEMENTS * (digits[1] - digits[0])) <= 0.002 * at_four  # magnitudes, 8 bytes an evaluation
        assert growth <= 1.35 * math.log2(RADIX[name]) * ELEMENTS / 8 * (num_steps - 4) * per_step + ELEMENTS


def test_a_shallow_solve_takes_little_more_than_a_checkpoint_of_every_evaluation():
    """States of 4 bytes an element; those that float64 held had a third more here, at any depth."""
    solver = make_solver("momentum 1/8", 4)
    assert peak_bytes(solver) <= 1.08 * peak_bytes(solver, BackpropAdjoint(checkpoint=True))


def test_bptt_grows_linearly():
    """The twin: the instrument sees memory that does grow."""
    peaks = [peak_bytes(ReversibleSolver(max_steps=n), BackpropAdjoint()) for n in (4, 8, 12)]
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0] > 8 * 4 * ELEMENTS


def test_each_stored_evaluation_takes_the_memory_of_one():
    """Linear in their number: as much as BPTT's, and the state and the value of each beside."""
    solver = ReversibleSolver(max_steps=8)
    peaks = [peak_bytes(solver, ReversibleAdjoint(stored_evaluations=k)) for k in (4, 8, 12)]
    bptt = [peak_bytes(ReversibleSolver(max_steps=n), BackpropAdjoint()) for n in (4, 8)]
    assert abs(peaks[2] - 2 * peaks[1] + peaks[0]) <= ELEMENTS < peaks[1] - peaks[0]  # a byte of digits
    assert 2 * (peaks[1] - peaks[0]) <= bptt[1] - bptt[0] + 8 * 2 * 4 * ELEMENTS
    assert peak_bytes(solver, ReversibleAdjoint(stored_evaluations=1)) <= 1.05 * peak_bytes(solver)
