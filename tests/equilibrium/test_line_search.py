"""BroydenSolver's line search against plain numbers, and what accelerated solvers do where nothing is to be found."""

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    DivergenceError,
    solve_fixed_point,
)
from tests.helpers.equilibrium import AttentionBlock


def solve(f, x, solver, z0=None):
    return solve_fixed_point(f, torch.zeros_like(x) if z0 is None else z0, x, solver=solver, adjoint=BackpropAdjoint())


def arctan_map(z: Tensor, x: Tensor) -> Tensor:
    """f(z) - z = -x * arctan(z): the root is 0; with x = 5 full steps jump over it, further each time at first."""
    return z - x * torch.arctan(z)


@pytest.mark.parametrize("memory", [1, 16])
def test_line_search_halves_until_the_residual_falls(memory):
    x, z0 = torch.full((1, 1), 8.0, dtype=torch.float64), torch.full((1, 1), 5.0, dtype=torch.float64)
    points = []

    def f(z, x):
        points.append(z.item())
        return arctan_map(z, x)

    solve(f, x, BroydenSolver(max_steps=7, max_halvings=8, memory=memory), z0)
    # The oracle: the secant method with the same rule, in plain numbers.
    residual = lambda z: -8 * np.arctan(z)  # noqa: E731
    base, inverse, expected = 5.0, -1.0, [5.0]
    while len(expected) < 7:
        step, length = -inverse * residual(base), 1.0
        while True:
            trial = base + length * step
            expected.append(trial)
            if abs(residual(trial)) <= (1 - 1e-4 * length) * abs(residual(base)):
                break
            length /= 2
        inverse = (trial - base) / (residual(trial) - residual(base))
        base = trial
    assert np.allclose(points, expected[:7], rtol=0, atol=1e-12)
    # The first step and the third had to be halved.
    assert abs(residual(points[1])) > abs(residual(points[0]))
    assert abs(residual(points[3])) > abs(residual(points[2]))


def test_line_search_makes_the_difference_and_gives_up_after_its_halvings():
    x = torch.tensor([[3.0], [30.0]], dtype=torch.float64)
    z0 = torch.full((2, 1), 2.0, dtype=torch.float64)
    searched = solve(arctan_map, x, BroydenSolver(max_steps=40, rtol=0.0, atol=1e-9, max_halvings=10), z0)
    assert searched.stats.converged.all()
    assert searched.value.abs().max() <= 1e-8
    # One halving is not enough for the second sample: the step is then taken as it is, and nothing hangs.
    points = []

    def f(z, x):
        points.append(z[1].item())
        return arctan_map(z, x)

    solve(f, x, BroydenSolver(max_steps=4, max_halvings=1), z0)
    assert np.isclose(points[2] - points[0], (points[1] - points[0]) / 2)  # refused, halved
    assert not np.isclose(points[3] - points[0], (points[1] - points[0]) / 4)  # accepted all the same


def test_block_without_a_fixed_point_does_not_pass_for_converged():
    """A pre-norm block adds about as much at every size: far out its relative residual is small."""
    for seed in range(3):
        torch.manual_seed(seed)
        f, x = AttentionBlock(64, 4), torch.randn(8, 32, 64)
        with torch.no_grad():
            for solver in (BroydenSolver(max_steps=25, rtol=1e-3), AndersonSolver(max_steps=25, rtol=1e-3)):
                solution = solve(f, x, solver)
                assert not solution.stats.converged.any()
                assert solution.value.abs().max() < 100
            # The twin: what the line search is there for.
            ran_away = solve(f, x, BroydenSolver(max_steps=25, rtol=1e-3, max_halvings=0))
            assert ran_away.stats.converged.all()
            assert ran_away.value.abs().amax((1, 2)).median() > 1000


@pytest.mark.parametrize("make", [AndersonSolver, BroydenSolver])
def test_map_without_a_fixed_point_is_an_error_or_not_converged(make):
    """f(z) = exp(z): no fixed point on the real line."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    with contextlib.suppress(DivergenceError):
        assert not solve(lambda z, x: z.exp() + x, x, make(max_steps=30, rtol=1e-6)).stats.converged.any()
