"""The gradient of the reversible solvers against back-propagation through plain loops that share no code with them."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from revdeq_lightning.equilibrium import BackpropAdjoint, MomentumSolver, ReversibleAdjoint, ReversibleSolver
from tests.helpers.equilibrium import BPTT, REVERSIBLE, AttentionBlock, ConvBlock, gradients, relative_error, solve


def plain_loop(f, z0: Tensor, x: Tensor, solver) -> Tensor:
    """The paper's two coupled iterations, or relaxation with momentum; states in float64."""
    previous = u = z0.double()
    for _ in range(solver.max_steps):
        if isinstance(solver, ReversibleSolver):
            previous = (1 - solver.beta) * previous + solver.beta * f(u.to(x.dtype), x).double()
            u = (1 - solver.beta) * u + solver.beta * f(previous.to(x.dtype), x).double()
        else:
            step = solver.beta * (f(u.to(x.dtype), x).double() - u) + solver.momentum * (u - previous)
            previous, u = u, u + step
    return u.to(x.dtype)


def problem(kind: str, dtype: torch.dtype):
    torch.manual_seed(3)
    if kind == "attention":
        f, shape = AttentionBlock(32, 4), (2, 12, 32)
    else:
        f, shape = ConvBlock(16), (2, 16, 6, 6)
    f = f.to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    z0 = (0.1 * torch.randn(shape, dtype=dtype)).requires_grad_()
    return f, z0, x


@pytest.mark.parametrize(
    ("kind", "dtype", "solver"),
    # Any two values of block, precision (states of 32 or 64 bits), coefficient (the digits' radix), and depth (the rows
    # of digits) meet in a row: every one of them is a path of its own, more than two together are not.
    [
        ("attention", torch.float32, ReversibleSolver(beta=0.5, max_steps=1)),
        ("attention", torch.float32, ReversibleSolver(beta=0.8, max_steps=128)),
        ("attention", torch.float32, ReversibleSolver(beta=1.2, max_steps=8)),
        ("attention", torch.float64, ReversibleSolver(beta=0.7, max_steps=8)),
        ("attention", torch.float64, ReversibleSolver(beta=0.9, max_steps=32)),
        ("conv", torch.float32, ReversibleSolver(beta=0.7, max_steps=32)),
        ("conv", torch.float32, ReversibleSolver(beta=0.9, max_steps=1)),
        ("conv", torch.float64, ReversibleSolver(beta=0.5, max_steps=32)),
        ("conv", torch.float64, ReversibleSolver(beta=0.8, max_steps=2)),
        ("conv", torch.float64, ReversibleSolver(beta=1.2, max_steps=128)),
        ("attention", torch.float32, MomentumSolver(beta=1.0, momentum=1 / 16, max_steps=7)),
        ("attention", torch.float64, MomentumSolver(beta=0.8, momentum=1 / 8, max_steps=128)),
        ("attention", torch.float32, MomentumSolver(beta=0.8, momentum=1 / 4, max_steps=1)),
        ("conv", torch.float64, MomentumSolver(beta=0.8, momentum=1 / 16, max_steps=1)),
        ("conv", torch.float32, MomentumSolver(beta=1.0, momentum=1 / 8, max_steps=7)),
        ("conv", torch.float64, MomentumSolver(beta=1.0, momentum=1 / 2, max_steps=7)),
        ("conv", torch.float32, MomentumSolver(beta=0.8, momentum=0.123, max_steps=60)),  # a = -123/1000
    ],
    ids=str,
)
def test_reversible_gradient_matches_bptt(kind, dtype, solver):
    f, z0, x = problem(kind, dtype)
    sources = (x, z0, *f.parameters())
    reference = gradients(plain_loop(f, z0, x, solver), *sources)
    solution = solve(f, x, solver, REVERSIBLE, z0)
    assert solution.value.dtype == dtype
    # Rounding of f in float32, and of the state to multiples of 2^-32, carried through up to 256 evaluations.
    assert relative_error(gradients(solution.value, *sources), reference) <= {torch.float32: 1e-5}.get(dtype, 1e-8)
    assert solution.stats.reconstruction_mismatch == 0


def test_reversible_and_backprop_make_the_same_iterates_bit_for_bit():
    f, z0, x = problem("attention", torch.float32)
    for solver in (ReversibleSolver(beta=0.7, max_steps=9), MomentumSolver(beta=0.8, momentum=-0.25, max_steps=9)):
        adjoints = REVERSIBLE, BPTT, BackpropAdjoint(checkpoint=True)
        values = [solve(f, x, solver, adjoint, z0).value for adjoint in adjoints]
        with torch.no_grad():
            values.append(solve(f, x, solver, REVERSIBLE, z0).value)
        assert all(torch.equal(value, values[0]) for value in values)


def test_float_states_lose_the_gradient_at_depth_and_exact_does_not():
    """What the exact arithmetic is for: the published float64 state is useless here."""
    f, z0, x = problem("attention", torch.float32)
    sources = (x, z0, *f.parameters())
    solvers = [ReversibleSolver(max_steps=24, arithmetic=kind) for kind in ("exact", "float64", "float32")]
    reference = gradients(plain_loop(f, z0, x, solvers[0]), *sources)
    exact, float64, float32 = (
        relative_error(gradients(solve(f, x, solver, ReversibleAdjoint(), z0).value, *sources), reference)
        for solver in solvers
    )
    assert exact <= 1e-5
    assert not float64 <= 0.1
    assert not float32 <= 0.1


# Evaluations whose activations are kept from the forward pass


class Counted(AttentionBlock):
    """Counts its calls."""

    calls = 0

    def forward(self, z, x):
        self.calls += 1
        return super().forward(z, x)


@pytest.mark.parametrize(
    ("solver", "around"),
    [
        (ReversibleSolver(max_steps=4), "plain"),
        (MomentumSolver(beta=0.8, max_steps=8), "checkpoint"),
        (MomentumSolver(beta=0.8, max_steps=8), "retained"),
        (ReversibleSolver(max_steps=4), "recorded"),
    ],
)
def test_stored_evaluations_change_the_calls_of_f_and_no_bit(solver, around):
    def run(stored):
        torch.manual_seed(0)
        f, x = Counted(16, 2, dropout=0.3), torch.randn(2, 5, 16, requires_grad=True)
        adjoint = ReversibleAdjoint(mismatch="raise", forward_with_grad=around == "recorded", stored_evaluations=stored)
        solutions = []

        def value(x):
            solutions.append(solve(f, x, solver, adjoint, z0=0.1 * x))
            return solutions[-1].value

        result = checkpoint(value, x, use_reentrant=False) if around == "checkpoint" else value(x)
        if around == "retained":
            result.square().sum().backward(retain_graph=True)
        result.square().sum().backward()
        assert solutions[-1].stats.reconstruction_mismatch == 0
        return [result, x.grad, *(p.grad for p in f.parameters())], solutions[-1].stats.backward_nfe, f.calls

    reference, nfe, calls = run(0)
    assert nfe == 8
    for stored in (3, 8, 9):
        tensors, nfe, fewer = run(stored)
        assert all(torch.equal(a, b) for a, b in zip(tensors, reference, strict=True))
        assert nfe == max(0, 8 - stored)
        if around != "checkpoint":  # which runs all again for what is stored
            assert calls - fewer == min(stored, 8) * (1 + (around == "retained"))


def test_stored_evaluations_are_not_reconstructed():
    """A part of f that no pass repeats is certified where all is stored, and nowhere else."""
    _, z0, x = problem("attention", torch.float32)
    calls, solver = itertools.count(), ReversibleSolver(max_steps=2)

    def mismatch(stored):
        adjoint = ReversibleAdjoint(mismatch="ignore", stored_evaluations=stored)
        solution = solve(lambda z, x: z + x / (1 + next(calls)), x, solver, adjoint, z0)
        solution.value.sum().backward()
        return solution.stats.reconstruction_mismatch

    assert mismatch(4) == 0
    assert mismatch(3) > 0
    closure = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match="its gradient would be lost"):
        solve(lambda z, x: z * closure, x, solver, ReversibleAdjoint(stored_evaluations=4), z0).value.sum().backward()
