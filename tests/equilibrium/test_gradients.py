"""The gradient of the reversible solvers against back-propagation through plain loops that share no code with them."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    EquilibriumLayer,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    solve_fixed_point,
)
from tests.helpers.equilibrium import AttentionBlock, ConvBlock, gradients, relative_error

BETAS = (0.5, 0.7, 0.8, 0.9, 1.2)


def paper_loop(f, z0: Tensor, x: Tensor, beta: float, num_steps: int) -> Tensor:
    """The paper's two coupled iterations, states in float64."""
    y = z = z0.double()
    for _ in range(num_steps):
        y = (1 - beta) * y + beta * f(z.to(x.dtype), x).double()
        z = (1 - beta) * z + beta * f(y.to(x.dtype), x).double()
    return z.to(x.dtype)


def momentum_loop(f, z0: Tensor, x: Tensor, beta: float, momentum: float, num_steps: int) -> Tensor:
    """Relaxation with momentum, states in float64."""
    previous = u = z0.double()
    for _ in range(num_steps):
        step = beta * (f(u.to(x.dtype), x).double() - u) + momentum * (u - previous)
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


def check(f, z0: Tensor, x: Tensor, solver, value: Tensor, tolerance: float) -> None:
    sources = (x, z0, *f.parameters())
    reference = gradients(value, *sources)
    solution = solve_fixed_point(f, z0, x, solver=solver, adjoint=ReversibleAdjoint(mismatch="raise"))
    assert solution.value.dtype == x.dtype
    assert relative_error(gradients(solution.value, *sources), reference) <= tolerance
    assert solution.stats.reconstruction_mismatch == 0


# Rounding of f in float32, and of the state to multiples of 2^-32, carried through up to 256 evaluations.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("kind", ["attention", "conv"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 32, 128])
def test_reversible_gradient_matches_bptt(kind, beta, num_steps, dtype, tolerance):
    f, z0, x = problem(kind, dtype)
    solver = ReversibleSolver(beta=beta, max_steps=num_steps)
    check(f, z0, x, solver, paper_loop(f, z0, x, beta, num_steps), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("kind", ["attention", "conv"])
@pytest.mark.parametrize("beta", [1.0, 0.8])
@pytest.mark.parametrize("momentum", [1 / 16, 1 / 8, 1 / 4, 1 / 2])
@pytest.mark.parametrize("num_steps", [1, 7, 128])
def test_momentum_gradient_matches_bptt(kind, beta, momentum, num_steps, dtype, tolerance):
    f, z0, x = problem(kind, dtype)
    solver = MomentumSolver(beta=beta, momentum=momentum, max_steps=num_steps)
    check(f, z0, x, solver, momentum_loop(f, z0, x, beta, momentum, num_steps), tolerance)


@pytest.mark.parametrize("arithmetic", ["exact", "float64"])
@pytest.mark.parametrize("adjoint", [ReversibleAdjoint(), BackpropAdjoint()], ids=["reversible", "backprop"])
@pytest.mark.parametrize("make", [ReversibleSolver, MomentumSolver])
def test_gradient_matches_finite_differences(make, adjoint, arithmetic):
    f, z0, x = problem("attention", torch.float64)
    solver = make(max_steps=3, arithmetic=arithmetic)
    weight, *directions = (torch.randn(z0.shape, dtype=torch.float64) for _ in range(3))

    def loss(step: float) -> Tensor:
        moved = (t + step * d for t, d in zip((z0, x), directions, strict=True))
        return (solve_fixed_point(f, *moved, solver=solver, adjoint=adjoint).value * weight).sum()

    grads = torch.autograd.grad(loss(0.0), (z0, x))
    derivative = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    difference = (loss(1e-4) - loss(-1e-4)) / 2e-4
    # 1e-5: the difference's own error, 1e-8 of curvature and 2^-32 / 1e-4 from the exact state's resolution.
    assert abs(derivative - difference) <= 1e-5 * abs(difference)


def test_reversible_and_backprop_make_the_same_iterates_bit_for_bit():
    f, z0, x = problem("attention", torch.float32)
    for solver in (ReversibleSolver(beta=0.7, max_steps=9), MomentumSolver(beta=0.8, momentum=-0.25, max_steps=9)):
        values = [
            solve_fixed_point(f, z0, x, solver=solver, adjoint=adjoint).value
            for adjoint in (ReversibleAdjoint(), BackpropAdjoint(), BackpropAdjoint(checkpoint=True))
        ]
        with torch.no_grad():
            values.append(solve_fixed_point(f, z0, x, solver=solver, adjoint=ReversibleAdjoint()).value)
        assert all(torch.equal(value, values[0]) for value in values)


def test_float_states_lose_the_gradient_at_depth_and_exact_does_not():
    """What the exact arithmetic is for: the published float64 state is useless here."""
    f, z0, x = problem("attention", torch.float32)
    sources = (x, z0, *f.parameters())
    reference = gradients(paper_loop(f, z0, x, 0.8, 24), *sources)

    def error(arithmetic: str) -> float:
        solver = ReversibleSolver(beta=0.8, max_steps=24, arithmetic=arithmetic)
        value = solve_fixed_point(f, z0, x, solver=solver, adjoint=ReversibleAdjoint()).value
        return relative_error(gradients(value, *sources), reference)

    assert error("exact") <= 1e-5
    assert not error("float64") <= 0.1
    assert not error("float32") <= 0.1


def test_many_evaluations_with_a_large_denominator_spill_and_come_back():
    f, z0, x = problem("conv", torch.float32)
    solver = MomentumSolver(beta=0.8, momentum=0.123, max_steps=60)  # a = -123/1000: 5 digits a word
    check(f, z0, x, solver, momentum_loop(f, z0, x, 0.8, 0.123, 60), 1e-5)


# Evaluations whose activations are kept from the forward pass


class Counted(AttentionBlock):
    """Counts its calls."""

    def forward(self, z, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(z, x)


@pytest.mark.parametrize("around", ["plain", "checkpoint", "retained", "recorded"])
@pytest.mark.parametrize("solver", [ReversibleSolver(max_steps=4), MomentumSolver(beta=0.8, max_steps=8)])
def test_stored_evaluations_change_the_calls_of_f_and_no_bit(solver, around):
    def run(stored):
        torch.manual_seed(0)
        f, x = Counted(16, 2, dropout=0.3), torch.randn(2, 5, 16, requires_grad=True)
        adjoint = ReversibleAdjoint(mismatch="raise", forward_with_grad=around == "recorded", stored_evaluations=stored)
        solutions = []

        def value(x):
            solutions.append(solve_fixed_point(f, 0.1 * x, x, solver=solver, adjoint=adjoint))
            return solutions[-1].value

        result = checkpoint(value, x, use_reentrant=False) if around == "checkpoint" else value(x)
        if around == "retained":
            result.square().sum().backward(retain_graph=True)
        result.square().sum().backward()
        assert solutions[-1].stats.reconstruction_mismatch == 0
        return [result, x.grad, *(p.grad for p in f.parameters())], solutions[-1].stats.backward_nfe, f.calls

    reference, nfe, calls = run(0)
    assert nfe == 8
    for stored in (1, 5, 8, 9):
        tensors, nfe, fewer = run(stored)
        assert all(torch.equal(a, b) for a, b in zip(tensors, reference, strict=True))
        assert nfe == max(0, 8 - stored)
        if around != "checkpoint":  # which runs all again for what is stored
            assert calls - fewer == min(stored, 8) * (1 + (around == "retained"))


def test_stored_evaluations_are_not_reconstructed_and_need_a_fixed_number():
    """A part of f that no pass repeats is certified where all is stored, and nowhere else."""
    f, z0, x = problem("attention", torch.float32)
    calls = itertools.count()
    solver = ReversibleSolver(max_steps=2)

    def mismatch(stored):
        adjoint = ReversibleAdjoint(mismatch="ignore", stored_evaluations=stored)
        solution = solve_fixed_point(lambda z, x: z + x / (1 + next(calls)), z0, x, solver=solver, adjoint=adjoint)
        solution.value.sum().backward()
        return solution.stats.reconstruction_mismatch

    assert mismatch(4) == 0
    assert mismatch(3) > 0
    adjoint = ReversibleAdjoint(stored_evaluations=1)
    with pytest.raises(ValueError, match=r"stored_evaluations=1 needs a solver without a tolerance, got .*rtol=0.1"):
        EquilibriumLayer(f, solver=ReversibleSolver(rtol=0.1), adjoint=adjoint)
    with pytest.raises(ValueError, match="stored_evaluations must be at least 0, got -1"):
        ReversibleAdjoint(stored_evaluations=-1)
    closure = torch.ones((), requires_grad=True)
    adjoint = ReversibleAdjoint(stored_evaluations=4)
    with pytest.raises(RuntimeError, match="its gradient would be lost"):
        solve_fixed_point(lambda z, x: z * closure, z0, x, solver=solver, adjoint=adjoint).value.sum().backward()
