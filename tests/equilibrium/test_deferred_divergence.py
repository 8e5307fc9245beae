"""A solve that diverges goes on with NaN where asked to: every gradient that other processes wait for is made."""

import math
import threading

import pytest

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    DivergenceError,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    RelaxedSolver,
    deferred_divergence,
)
from tests.helpers.equilibrium import BPTT, REVERSIBLE, attention_layer, sequence

PAIRS = [
    (MomentumSolver(max_steps=3), REVERSIBLE),
    (MomentumSolver(max_steps=3, rtol=1e-3), REVERSIBLE),
    (RelaxedSolver(max_steps=3), BPTT),
    (AndersonSolver(max_steps=3, rtol=1e-3), ImplicitAdjoint(unconverged="raise")),
    (RelaxedSolver(max_steps=3), PhantomAdjoint()),
]


def layer_and_input(solver, adjoint):
    return attention_layer(solver, adjoint), sequence().detach()


@pytest.mark.parametrize(("solver", "adjoint"), PAIRS)
def test_a_solve_that_diverges_gives_nan_to_its_result_and_every_gradient(solver, adjoint):
    layer, x = layer_and_input(solver, adjoint)
    x[1, 0, 0] = math.nan
    x.requires_grad_()
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
    layer, x = layer_and_input(AndersonSolver(max_steps=40, rtol=1e-3), ImplicitAdjoint(unconverged="ignore"))

    def backward(solution):
        solution.value.register_hook(lambda gradient: gradient * math.nan)
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
    layer, x = layer_and_input(*PAIRS[0])
    x[0, 0, 0] = math.inf
    errors = []
    with deferred_divergence(errors):
        layer(layer(x).value).value.sum().backward()
    assert [type(error) for error in errors] == [DivergenceError] * 2
    assert all(not p.grad.isfinite().all() for p in layer.parameters())
