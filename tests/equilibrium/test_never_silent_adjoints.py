"""Solves that did not converge, and settings that cannot work: reported, with the figures and what to change."""

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
    PhantomAdjoint,
    PicardSolver,
)
from tests.helpers.equilibrium import TIGHT, AttentionBlock, TanhMap, inputs, project, sequence, solve, with_adjoint


def test_linear_solve_that_does_not_converge_is_one_warning_with_its_residual():
    f, x = TanhMap(norm=0.95), inputs()
    solver = AndersonSolver(max_steps=100, rtol=1e-10)
    short = ImplicitAdjoint(solver=PicardSolver(max_steps=3, rtol=1e-8))
    solution = solve(f, x, solver, short)
    with pytest.warns(ConvergenceWarning) as record:
        project(solution.value).backward()
    assert len(record) == 1
    residual = f"{float(solution.stats.backward_relative_residual.max()):.3g}"
    message = str(record[0].message)
    assert re.search(rf"backward linear system has not converged in 3 of 3 samples.*{re.escape(residual)} after 3 steps"
                     r" of PicardSolver\(max_steps=3.*Raise max_steps", message)  # fmt: skip
    assert "fixed point, where" not in message
    assert float(residual) > 1e-4
    assert f"{solution.stats.backward_num_products}" == "4"
    loss = project(solve(f, x, solver, ImplicitAdjoint(solver=short.solver, unconverged="raise")).value)
    with pytest.raises(ConvergenceError, match="has not converged"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(f, x, solver, ImplicitAdjoint(solver=short.solver, unconverged="ignore"))
        project(solution.value).backward()
    assert float(solution.stats.backward_relative_residual.max()) > 1e-4


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


@with_adjoint
def test_non_finite_state_is_an_error(adjoint):
    with pytest.raises(DivergenceError, match="not finite"):
        solve(lambda z, x: x / z.sum() * 0, inputs(), PicardSolver(max_steps=9), adjoint)


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: ImplicitAdjoint(solver="anderson"), ("solver must be one such as", "'anderson'")),
        (lambda: ImplicitAdjoint(solver=AndersonSolver()), ("needs a tolerance", "AndersonSolver(", "rtol=1e-5")),
        (lambda: ImplicitAdjoint(unconverged="error"), ("'warn', 'raise', 'ignore'", "'error'")),
        (lambda: PhantomAdjoint(num_steps=0), ("num_steps must be at least 1", "0")),
        (lambda: PhantomAdjoint(num_steps=True), ("num_steps must be", "True")),
        (lambda: PhantomAdjoint(beta=2.0), ("beta must be in (0, 2)", "2.0")),
        (lambda: PhantomAdjoint(beta="1"), ("beta must be in (0, 2)", "'1'")),
        (lambda: PhantomAdjoint(kind="jfb"), ("'unrolled', 'neumann'", "'jfb'")),
        (lambda: AndersonSolver(memory=0), ("memory must be at least 1", "0")),
        (lambda: AndersonSolver(ridge=0.0), ("ridge must be in (0, inf)", "0.0", "1e-6")),
        (lambda: AndersonSolver(ridge=float("inf")), ("ridge must be in (0, inf)", "inf")),
        (lambda: AndersonSolver(ridge_scale="none"), ("'relative', 'absolute'", "'none'")),
        (lambda: BroydenSolver(memory=1.5), ("memory must be", "1.5")),
        (lambda: BroydenSolver(max_halvings=-1), ("max_halvings must be at least 0", "-1")),
    ],
)
def test_settings(make, fragments):
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, fragments))):
        make()


def test_transformer_block_without_a_fixed_point_is_reported():
    """The block of the other tests grows with every evaluation: no gradient of a fixed point is to be had there."""
    torch.manual_seed(0)
    f, x = AttentionBlock(dim=16, num_heads=2), sequence()
    solution = solve(f, x, AndersonSolver(max_steps=12, rtol=1e-4), ImplicitAdjoint())
    if bool(solution.stats.converged.all()):
        pytest.fail("this block was taken to have no fixed point")
    with pytest.warns(ConvergenceWarning, match="not converged"):
        project(solution.value).backward()
