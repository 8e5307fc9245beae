"""Peak memory over depth, in bytes that tensors hold: whole numbers, the same in every repetition."""

from math import log2

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

RADIX = {"RevDEQ 0.8": 5, "RevDEQ 0.5": 2, "momentum 1/8": 8}
FREE_STEPS = {"RevDEQ 0.8": 22, "RevDEQ 0.5": 52, "momentum 1/8": 34}
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
def test_memory_is_that_of_four_steps_while_the_words_last(name):
    at_four = peak_bytes(make_solver(name, 4))
    for num_steps in (8, FREE_STEPS[name]):
        assert peak_bytes(make_solver(name, num_steps)) <= 1.02 * at_four


@solvers
@pytest.mark.parametrize("since", [4, "free"])
def test_memory_beyond_grows_by_at_most_a_quarter_more_than_the_remainders(name, since):
    """Counted from the first steps, which the words hold, or only from the last step that they hold."""
    per_step = make_solver(name, 1).evaluations_per_step
    start = FREE_STEPS[name] if since == "free" else since
    at_start = peak_bytes(make_solver(name, start))
    # A group of up to eight digits is put aside at a time: in the first steps beyond it is ahead of its digits.
    deep = {4: (FREE_STEPS[name] + 1, 64, 128), "free": (2 * FREE_STEPS[name] + 20, 128)}[since]
    for num_steps in deep:
        growth_bits = 8 * (peak_bytes(make_solver(name, num_steps)) - at_start)
        assert 0 < growth_bits <= 1.25 * log2(RADIX[name]) * ELEMENTS * (num_steps - start) * per_step


def test_bptt_grows_linearly():
    """The twin: the instrument sees memory that does grow."""
    peaks = [peak_bytes(ReversibleSolver(max_steps=n), BackpropAdjoint()) for n in (4, 8, 12)]
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0] > 8 * 4 * ELEMENTS


def test_each_stored_evaluation_takes_the_memory_of_one():
    """Linear in their number: as much as BPTT's, and the state and the value of each beside."""
    solver = ReversibleSolver(max_steps=8)
    peaks = [peak_bytes(solver, ReversibleAdjoint(stored_evaluations=k)) for k in (4, 8, 12)]
    bptt = [peak_bytes(ReversibleSolver(max_steps=n), BackpropAdjoint()) for n in (4, 8)]
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0] > 0
    assert 2 * (peaks[1] - peaks[0]) <= bptt[1] - bptt[0] + 8 * 2 * 4 * ELEMENTS
    assert peak_bytes(solver, ReversibleAdjoint(stored_evaluations=1)) <= 1.05 * peak_bytes(solver)
