"""Peak memory over depth, in bytes that tensors hold: whole numbers, the same in every repetition."""

import gc
import math

import pytest
import torch
from torch import nn

from benchmarks.measure import peak_tensor_bytes
from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from tests.helpers.equilibrium import BPTT, AttentionBlock, Damped, solve

TOKENS, DIM = 16, 16
ELEMENTS = TOKENS * DIM


def peak_bytes(solver, adjoint=None, contracting=False):
    """Of a forward and a backward pass, with the gradient of every parameter, x and z0."""
    torch.manual_seed(0)
    f = AttentionBlock(DIM, 4)
    f = Damped(f) if contracting else f
    x, z0 = (torch.randn(1, TOKENS, DIM, requires_grad=True) for _ in range(2))

    def run():
        value = solve(f, x, solver, adjoint or ReversibleAdjoint(), z0).value
        torch.autograd.grad(value.sum(), [z0, x, *f.parameters()])

    return peak_tensor_bytes(run)


@pytest.fixture(autouse=True, scope="module")
def _warm():
    peak_bytes(ReversibleSolver(max_steps=1))
    peak_bytes(RelaxedSolver(max_steps=1), PhantomAdjoint(num_steps=1))
    gc.freeze()  # the measurement looks for garbage first: not in all modules each time
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("make", "radix"),
    [
        (lambda n: ReversibleSolver(beta=0.8, max_steps=n), 5),
        (lambda n: ReversibleSolver(beta=0.5, max_steps=n), 2),
        (lambda n: MomentumSolver(momentum=1 / 8, max_steps=n), 8),
    ],
    ids=["RevDEQ 0.8", "RevDEQ 0.5", "momentum 1/8"],
)
def test_memory_grows_by_the_digits_alone(make, radix):
    """Nothing but `ceil(log2(radix))` bits of an element and evaluation, in whole bytes."""
    per_step = make(1).evaluations_per_step
    at_four, bits = peak_bytes(make(4)), math.ceil(math.log2(radix))
    for num_steps in (7, 30 // per_step):
        digits = [math.ceil(bits * n * per_step / 8) for n in (4, num_steps)]
        growth = peak_bytes(make(num_steps)) - at_four
        assert abs(growth - ELEMENTS * (digits[1] - digits[0])) <= 0.002 * at_four  # magnitudes, 8 bytes an evaluation
        assert growth <= 1.35 * math.log2(radix) * ELEMENTS / 8 * (num_steps - 4) * per_step + ELEMENTS


def test_a_shallow_solve_takes_no_more_than_a_checkpoint_of_every_evaluation():
    """States of 4 bytes an element, and nothing of one evaluation beside the next: 3 % less here."""
    solver = MomentumSolver(momentum=1 / 8, max_steps=4)
    assert peak_bytes(solver) <= peak_bytes(solver, BackpropAdjoint(checkpoint=True))


def test_stored_steps_grow_linearly():
    """The twin: the instrument sees memory that does grow, of BPTT and of an unrolled phantom gradient."""
    bptt = [peak_bytes(ReversibleSolver(max_steps=n), BPTT) for n in (2, 4, 6)]
    phantom = [peak_bytes(RelaxedSolver(max_steps=4), PhantomAdjoint(num_steps=n)) for n in (4, 8, 12)]
    for peaks in (bptt, phantom):
        assert peaks[2] - peaks[1] == peaks[1] - peaks[0] > 4 * 4 * 4 * ELEMENTS


def test_each_stored_evaluation_takes_the_memory_of_one():
    """Linear in their number: as much as BPTT's, and the state of each beside."""
    solver = ReversibleSolver(max_steps=4)
    peaks = [peak_bytes(solver, ReversibleAdjoint(stored_evaluations=k)) for k in (2, 4, 6)]
    bptt = [peak_bytes(ReversibleSolver(max_steps=n), BPTT) for n in (2, 4)]
    assert abs(peaks[2] - 2 * peaks[1] + peaks[0]) <= ELEMENTS < peaks[1] - peaks[0]  # a byte of digits
    assert 2 * (peaks[1] - peaks[0]) <= bptt[1] - bptt[0] + 4 * 4 * ELEMENTS
    assert peak_bytes(solver, ReversibleAdjoint(stored_evaluations=1)) <= 1.05 * peak_bytes(solver)


def test_implicit_and_phantom_gradients_do_not_depend_on_the_steps_of_either_solve():
    def implicit(make, n):
        return ImplicitAdjoint(solver=make(max_steps=n, rtol=1e-12), unconverged="ignore")

    for make, few, many in ((RelaxedSolver, 2, 8), (AndersonSolver, 7, 10)):  # whose window is full after 6 steps
        for adjoint in (PhantomAdjoint(num_steps=2), PhantomAdjoint(kind="neumann"), None):
            peaks = [peak_bytes(make(max_steps=n), adjoint or implicit(make, n), contracting=True) for n in (few, many)]
            assert peaks[1] - peaks[0] <= 16 * (many - few)  # a few numbers a step, where a state has 1024 bytes
        if make is RelaxedSolver:
            assert peaks[1] < peak_bytes(make(max_steps=many), BPTT, contracting=True) / 3


def test_autocast_keeps_no_cast_of_a_state():
    class Direct(nn.Module):
        """A matrix product of the state itself."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64, bias=False)

        def forward(self, z, x):
            return torch.tanh(self.linear(z) + x)

    def peak(num_steps):
        torch.manual_seed(0)
        layer, x = EquilibriumLayer(Direct(), solver=MomentumSolver(max_steps=num_steps)), torch.randn(64, 64)

        def run():
            with torch.autocast("cpu", torch.bfloat16):
                loss = layer(x).value.sum()
            loss.backward()
            layer.zero_grad()

        return peak_tensor_bytes(run)

    peak(2)
    digits = 64 * 64 * (16 - 4) * 3 / 8  # bytes
    assert peak(16) <= 1.01 * peak(4) + digits
