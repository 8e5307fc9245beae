"""ImplicitAdjoint against a dense solve, closed forms, finite differences and counts; and what it reports."""

import re
import warnings

import pytest
import torch

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BroydenSolver,
    ConvergenceError,
    ConvergenceWarning,
    DivergenceError,
    ImplicitAdjoint,
    PicardSolver,
    ReversibleSolver,
)
from tests.helpers.equilibrium import (
    EVERY_SOLVER,
    TIGHT,
    Affine,
    TanhMap,
    dense_implicit_gradients,
    gradients,
    inputs,
    project,
    refuses,
    relative_error,
    solve,
    with_adjoint,
)


@pytest.mark.parametrize(("make", "mixing"), [*((make, 0.0) for make in EVERY_SOLVER.values()), (AndersonSolver, 0.1)])
def test_implicit_gradient_matches_a_dense_solve(make, mixing):
    """Every solver forward, and for the linear system; with a map that mixes samples, too."""
    f, x = TanhMap(mixing=mixing), inputs()
    # A sample that stopped may be off again a little once those it is mixed with have moved on.
    adjoint = ImplicitAdjoint(solver=make(max_steps=300, rtol=1e-8), unconverged="ignore" if mixing else "raise")
    solution = solve(f, x, make(max_steps=300, rtol=1e-8), adjoint)
    expected = dense_implicit_gradients(f, solution.value, x, f.weight)
    assert relative_error(gradients(solution.value, x, f.weight), expected) <= 1e-6  # residuals of 1e-8
    assert float(solution.stats.backward_relative_residual.max()) <= (1e-6 if mixing else 1e-8)


def test_implicit_gradient_is_the_dense_one_of_a_point_that_is_no_fixed_point():
    """Whatever point the solver returns, the formula is evaluated there."""
    f, x = TanhMap(norm=1.5), inputs()
    value = solve(f, x, PicardSolver(max_steps=2), TIGHT).value
    expected = dense_implicit_gradients(f, value, x, f.weight)
    assert relative_error(gradients(value, x, f.weight), expected) <= 1e-9


def test_implicit_gradient_of_an_affine_map_that_expands():
    """Closed form with eigenvalues up to 3: plain iteration would diverge in both passes."""
    f, x, solver = Affine(3.0), inputs(4, 5), BroydenSolver(max_steps=60, rtol=1e-10, max_halvings=0)
    value, closed_form = solve(f, x, solver, TIGHT).value, f.fixed_point(x)
    assert relative_error(value, closed_form) <= 1e-8
    assert relative_error(gradients(value, x, f.weight), gradients(closed_form, x, f.weight)) <= 1e-8
    value = solve(f, x, solver, ImplicitAdjoint(solver=PicardSolver(max_steps=2000, rtol=1e-8))).value
    with refuses(DivergenceError, "linear system of ImplicitAdjoint", "expands", "BroydenSolver", "PicardSolver"):
        gradients(value, x)


def test_calls_and_products_are_counted_by_f_itself():
    f, x = TanhMap(), inputs()
    solution = solve(f, x, PicardSolver(max_steps=9), TIGHT)
    assert f.calls == 10 == solution.stats.forward_nfe  # one more, recorded
    assert (solution.stats.backward_nfe, solution.stats.backward_num_products) == (None, None)
    project(solution.value).backward()
    assert f.calls == 10
    assert solution.stats.backward_nfe == 0
    assert f.backward_calls == solution.stats.backward_num_products + 1  # and one for x and the parameters
    assert 5 < solution.stats.backward_num_products < 40
    assert solution.stats.backward_relative_residual.shape == (3,)


@with_adjoint
def test_without_gradients_nothing_is_recorded_and_f_is_not_called_again(adjoint):
    f, x = TanhMap(), inputs()
    for context in (torch.no_grad, torch.inference_mode):
        f.calls = 0
        with context():
            solution = solve(f, x, PicardSolver(max_steps=9), adjoint)
        assert f.calls == 9 == solution.stats.forward_nfe
        assert not solution.value.requires_grad
    f.requires_grad_(False)
    assert not solve(f, x.detach(), PicardSolver(max_steps=9), adjoint).value.requires_grad
    assert solve(f, x, PicardSolver(max_steps=9), adjoint).value.requires_grad


def test_linear_solve_knows_no_scale_of_the_loss():
    """Gradients of 1e-20 are below the residual's epsilon and the exact state's resolution."""
    f, x = TanhMap(), inputs()
    for backward, scale in ((AndersonSolver, 1e-20), (ReversibleSolver, 1e-20), (ReversibleSolver, 1e12)):
        adjoint = ImplicitAdjoint(solver=backward(max_steps=100, rtol=1e-8), unconverged="raise")
        one, scaled = (solve(f, x, PicardSolver(max_steps=60), adjoint) for _ in range(2))
        expected = gradients(one.value, x, f.weight)
        assert relative_error(gradients(scale * scaled.value, x, f.weight) / scale, expected) <= 1e-12
        assert one.stats.backward_num_products == scaled.stats.backward_num_products


def test_sample_without_a_cotangent_has_no_gradient_and_does_not_disturb():
    f, x = TanhMap(), inputs()
    value = solve(f, x, PicardSolver(max_steps=60), TIGHT).value
    (gradient,) = torch.autograd.grad(value[1:].sum(), x)
    assert torch.equal(gradient[0], torch.zeros(6, dtype=torch.float64))
    alone = x.detach()[1:].requires_grad_()
    (expected,) = torch.autograd.grad(solve(f, alone, PicardSolver(max_steps=60), TIGHT).value.sum(), alone)
    assert relative_error(gradient[1:], expected) <= 1e-10


# Solves that did not converge


def test_linear_solve_that_does_not_converge_is_one_warning_with_its_residual():
    f, x = TanhMap(norm=0.95), inputs()

    def backward(unconverged):
        adjoint = ImplicitAdjoint(solver=PicardSolver(max_steps=3, rtol=1e-8), unconverged=unconverged)
        solution = solve(f, x, AndersonSolver(max_steps=100, rtol=1e-10), adjoint)
        project(solution.value).backward()
        return solution.stats

    with pytest.warns(ConvergenceWarning) as record:
        stats = backward("warn")
    (message,) = (str(warning.message) for warning in record)
    residual = f"{float(stats.backward_relative_residual.max()):.3g}"
    assert re.search(rf"backward linear system has not converged in 3 of 3 samples.*{re.escape(residual)} after 3 steps"
                     r" of PicardSolver\(max_steps=3.*Raise max_steps", message)  # fmt: skip
    assert "fixed point, where" not in message
    assert float(residual) > 1e-4
    assert stats.backward_num_products == 4
    with pytest.raises(ConvergenceError, match="has not converged"):
        backward("raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(backward("ignore").backward_relative_residual.max()) > 1e-4


def test_fixed_point_that_was_not_reached_is_a_warning_too():
    f, x = TanhMap(norm=0.95), inputs()
    solution = solve(f, x, PicardSolver(max_steps=2, rtol=1e-8), TIGHT)
    assert solution.stats.converged.tolist() == [False] * 3
    with pytest.warns(ConvergenceWarning, match=r"fixed point.*has not converged in 3 of 3.*2 steps of PicardSolver"):
        project(solution.value).backward()
    # Without a tolerance nothing was asked for: the stats tell.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(f, x, PicardSolver(max_steps=2), TIGHT)
        project(solution.value).backward()
    assert solution.stats.converged is None
    assert float(solution.stats.relative_residual.max()) > 1e-2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_of_the_loss_is_an_error(bad):
    x = inputs()
    value = solve(TanhMap(), x, PicardSolver(max_steps=9), TIGHT).value
    with pytest.raises(DivergenceError, match="not finite"):
        (bad * value).sum().backward()
