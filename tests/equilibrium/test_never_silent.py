"""States and maps that cannot work: errors that show the value received and what to change."""

import dataclasses
import threading
from math import inf, nan

import pytest
import torch

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BroydenSolver,
    DivergenceError,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
    deferred_divergence,
    solve_fixed_point,
)
from tests.helpers.equilibrium import BPTT, IMPLICIT, REVERSIBLE, SOLVERS, attention_layer, refuses, sequence, solve

SOLVER = SOLVERS["reversible"]

# The state


@pytest.mark.parametrize(
    ("z0", "fragments"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), ("floating-point", "int64", "(4, 3)")),
        (torch.zeros(4, dtype=torch.complex64), ("floating-point", "complex64")),
        (torch.tensor(0.0), ("(batch, ...)", "()")),
        (torch.zeros(0, 3), ("at least 1", "(0, 3)")),
        (torch.zeros(3, 0), ("at least 1", "(3, 0)")),
        ((torch.zeros(4, 3), torch.zeros(5, 3)), ("one batch size", "[4, 5]")),
        ((torch.zeros(4, 3), torch.zeros(4, 3, device="meta")), ("one device", "cpu", "meta")),
        ([], ("at least one tensor",)),
        (None, ("floating-point", "None")),
        ([torch.zeros(4, 3), 1.0], ("floating-point", "1.0")),
    ],
    ids=lambda value: None,
)
def test_initial_state(z0, fragments):
    with refuses(ValueError, "z0", *fragments):
        solve_fixed_point(lambda z, x: z, z0, None, solver=SOLVER, adjoint=REVERSIBLE)


def test_layer_without_an_initial_state():
    layer = attention_layer(SOLVER, REVERSIBLE)
    with refuses(ValueError, "z0 is needed", "tuple"):
        layer((sequence(), sequence()))


@pytest.mark.parametrize(
    ("f", "fragments"),
    [
        (lambda z, x: x[:, :3], ("f must", "shape", "(4, 5, 16)", "(4, 3, 16)")),
        (lambda z, x: x.sum(), ("f must", "shape", "(4, 5, 16)", "()")),
        (lambda z, x: x.double(), ("f must", "dtype", "float32", "float64")),
        (lambda z, x: x > 0, ("f must", "dtype", "float32", "bool")),
        (lambda z, x: x.to("meta"), ("f must", "device", "cpu", "meta")),
        (lambda z, x: (x, x), ("f must", "structure")),
        (lambda z, x: None, ("f must", "NoneType")),
        (lambda z, x: 1.0, ("f must", "float")),
    ],
    ids=["shape", "scalar", "wider", "bool", "device", "tuple", "none", "number"],
)
def test_f_that_changes_the_state(f, fragments):
    """Whatever evaluates it: the autograd function of the reversible adjoint, a plain loop, with a tolerance."""
    for solver, adjoint, context in (
        (SOLVER, REVERSIBLE, torch.enable_grad),
        (SOLVERS["momentum"], BPTT, torch.enable_grad),
        (SOLVERS["tolerance"], REVERSIBLE, torch.no_grad),
    ):
        with context(), refuses(ValueError, *fragments):
            solve(f, sequence(), solver, adjoint)


# Divergence


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("arithmetic", ["exact", "float32"])
def test_non_finite_initial_state(bad, arithmetic):
    z0 = torch.zeros(4, 5, 16)
    z0[2, 3, 4] = bad
    for context in (torch.enable_grad, torch.no_grad):
        with context(), refuses(DivergenceError, "not finite", "in z0", "Look for NaN", "ReversibleSolver"):
            solve(lambda z, x: x, sequence(), ReversibleSolver(arithmetic=arithmetic), REVERSIBLE, z0)


class BreaksAt:
    """f that returns `bad` at one element of one sample in its k-th evaluation."""

    def __init__(self, k, bad):
        self.k, self.bad, self.calls = k, bad, 0

    def __call__(self, z, x):
        self.calls += 1
        value = torch.tanh(z + x)
        if self.calls == self.k:
            value = value.index_fill(0, torch.tensor([1]), self.bad)
        return value


@pytest.mark.parametrize(
    "solver",
    [
        SOLVER,
        MomentumSolver(beta=0.8, momentum=0.125, max_steps=8),
        ReversibleSolver(max_steps=4, rtol=1e-9),
        PicardSolver(max_steps=8),
        PicardSolver(max_steps=8, rtol=1e-9),
        RelaxedSolver(max_steps=8, atol=1e-9),
        AndersonSolver(max_steps=8),
        AndersonSolver(max_steps=8, rtol=1e-9),
        BroydenSolver(max_steps=8),
        BroydenSolver(max_steps=8, rtol=1e-9),
    ],
    ids=str,
)
def test_non_finite_evaluation_is_named(solver):
    """The first, one in the midst, and the last."""
    for adjoint in (BPTT, REVERSIBLE) if isinstance(solver, ReversibleSolver | MomentumSolver) else (BPTT,):
        for k, bad in ((1, inf), (5, nan), (8, nan)):
            step = (k - 1) // solver.evaluations_per_step + 1
            with refuses(DivergenceError, "not finite", f"after {k} evaluations of f (step {step})", "Look for NaN"):
                solve(BreaksAt(k, bad), sequence(), solver, adjoint)


@pytest.mark.parametrize(
    ("solver", "dtype", "limit", "wider"),
    [
        (ReversibleSolver(beta=0.5, max_steps=8), torch.float32, "1024", "2.621e+05"),
        (ReversibleSolver(beta=1.2, max_steps=8), torch.bfloat16, "853.3", "1.049e+05"),
        (MomentumSolver(momentum=0.125, max_steps=8), torch.float32, "910.2", "6.554e+04"),
        (ReversibleSolver(beta=0.8, max_steps=8, arithmetic="exact64"), torch.float32, "1.049e+05", None),
        (MomentumSolver(momentum=0.125, max_steps=8), torch.float64, "6.554e+04", None),
        (ReversibleSolver(beta=0.9995, max_steps=8), torch.float32, "1024", None),  # in 64 bits: 262
    ],
)
def test_state_beyond_the_range_of_the_exact_state(solver, dtype, limit, wider):
    """`wider` is the range that the advice names."""
    x = torch.full((4, 3), 1.5 * float(limit), requires_grad=True, dtype=dtype)
    advice = [f"arithmetic='exact64' (a range of {wider})"] if wider else []
    beyond = "reached", f"beyond the range of {limit}", "after ", "normalize", "lower beta", *advice
    with refuses(DivergenceError, *beyond) as error:
        solve(lambda z, x: x + z, x, solver, REVERSIBLE)
    assert wider or "exact64' (" not in str(error.value)
    with refuses(DivergenceError, "reached", limit, "in z0"):
        solve(lambda z, x: 0 * z, x, solver, BPTT, z0=x.detach().clone())
    if wider:
        wide = dataclasses.replace(solver, arithmetic="exact64", max_steps=2)
        assert solve(lambda z, x: x + 0 * z, x, wide, REVERSIBLE).value.isfinite().all()


def test_float_states_have_no_such_range():
    for arithmetic in ("float64", "float32"):
        x = torch.full((2, 3), 1e9)
        solution = solve(lambda z, x: x + 0 * z, x, ReversibleSolver(arithmetic=arithmetic), REVERSIBLE)
        assert (solution.value - 1e9).abs().max() < 1e9


# A solve that diverges goes on with NaN where asked to: every gradient that other processes wait for is made

DEFERRED = [
    (MomentumSolver(max_steps=3), REVERSIBLE),
    (MomentumSolver(max_steps=3, rtol=1e-3), REVERSIBLE),
    (RelaxedSolver(max_steps=3), BPTT),
    (AndersonSolver(max_steps=3, rtol=1e-3), ImplicitAdjoint(unconverged="raise")),
    (RelaxedSolver(max_steps=3), PhantomAdjoint()),
]


@pytest.mark.parametrize(("solver", "adjoint"), DEFERRED)
def test_a_solve_that_diverges_gives_nan_to_its_result_and_every_gradient(solver, adjoint):
    layer, x = attention_layer(solver, adjoint), sequence()
    x.data[1, 0, 0] = nan
    with pytest.raises(DivergenceError, match="is not finite"):
        layer(x)
    errors = []
    with deferred_divergence(errors):
        solution = layer(x)
    (error,) = errors
    assert "the state is not finite (nan)" in str(error)
    assert solution.value.isnan().all()
    assert solution.stats.relative_residual.isnan().all()
    assert solution.stats.reconstruction_mismatch is None
    assert (solution.stats.converged is None) == (not solver.has_tolerance)
    solution.value.sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(g is not None and not g.isfinite().all() for g in gradients)
    assert len(errors) == 1
    with pytest.raises(DivergenceError):
        layer(x)  # outside it is an error again


def test_the_linear_solve_of_a_backward_pass_too_in_whatever_thread_it_runs():
    layer, x = attention_layer(AndersonSolver(max_steps=40, rtol=1e-3), IMPLICIT), sequence()

    def backward(solution):
        solution.value.register_hook(lambda gradient: gradient * nan)
        solution.value.sum().backward()

    with pytest.raises(DivergenceError, match="linear system of ImplicitAdjoint's backward pass diverged"):
        backward(layer(x))
    layer.zero_grad()
    errors = []
    with deferred_divergence(errors):
        solution = layer(x)
    assert solution.value.isfinite().all()
    assert not errors
    thread = threading.Thread(target=backward, args=(solution,))
    thread.start()
    thread.join()
    (error,) = errors
    assert "linear system" in str(error)
    assert all(p.grad is not None and not p.grad.isfinite().all() for p in layer.parameters())


def test_a_later_equilibrium_diverges_on_what_an_earlier_one_left_and_both_are_noted():
    layer, x = attention_layer(*DEFERRED[0]), sequence()
    x.data[0, 0, 0] = inf
    errors = []
    with deferred_divergence(errors):
        layer(layer(x).value).value.sum().backward()
    assert [type(error) for error in errors] == [DivergenceError] * 2
    assert all(not p.grad.isfinite().all() for p in layer.parameters())
