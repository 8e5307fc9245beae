"""AndersonSolver and BroydenSolver against SciPy, dense linear algebra in NumPy, closed forms and counts of calls."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from revdeq_lightning.equilibrium import AndersonSolver, BroydenSolver, DivergenceError, PicardSolver
from tests.helpers.equilibrium import BPTT, Affine, AttentionBlock, TanhMap, gradients, inputs, relative_error, solve

SOLVERS = [
    AndersonSolver(max_steps=60, rtol=1e-12),
    AndersonSolver(max_steps=60, rtol=1e-12, memory=3, beta=0.8),
    BroydenSolver(max_steps=60, rtol=1e-12),
    BroydenSolver(max_steps=60, rtol=1e-12, max_halvings=0),
    BroydenSolver(max_steps=60, rtol=1e-12, memory=4, beta=0.8, max_halvings=3),
]

with_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)
with_both = pytest.mark.parametrize("make", [AndersonSolver, BroydenSolver])


def problem(norm=0.9):
    return TanhMap(norm, dim=12), inputs(3, 12)


@with_solver
def test_fixed_point_is_that_of_scipy(solver):
    f, x = problem()
    value, weight = solve(f, x, solver, BPTT).value, f.weight.detach().numpy()
    for i, sample in enumerate(x.detach().numpy()):
        found = optimize.root(lambda z, sample=sample: np.tanh(weight @ z + sample) - z, np.zeros(12), tol=1e-12)
        assert found.success
        assert relative_error(value[i], torch.from_numpy(found.x)) <= 1e-10  # both stop at residuals of 1e-12


def iterates(f, x, solver, z0=None):
    """What f was evaluated at, `(step, dim)`, for a batch of one."""
    seen = []

    def noting(z, x):
        seen.append(z.detach().clone())
        return f(z, x)

    solve(noting, x[:1].detach(), solver, BPTT, z0)
    return torch.cat(seen).numpy()


def test_anderson_iterates_are_those_of_dense_least_squares():
    f, x = problem()
    ours = iterates(f, x, AndersonSolver(memory=4, beta=0.7, ridge=1e-14, max_steps=9))
    weight, sample = f.weight.detach().numpy(), x[0].detach().numpy()
    # The oracle in differences: min over gamma of norm(g_k - sum_i gamma_i (g_{i+1} - g_i)), by NumPy's lstsq.
    states, residuals = [np.zeros(12)], []
    for k in range(8):
        residuals.append(np.tanh(weight @ states[-1] + sample) - states[-1])
        window = slice(max(0, k - 4), None)
        z_window, g_window = np.array(states[window]), np.array(residuals[window])
        step = states[-1] + 0.7 * residuals[-1]
        if k:
            dz, dg = np.diff(z_window, axis=0), np.diff(g_window, axis=0)
            gamma = np.linalg.lstsq(dg.T, residuals[-1], rcond=None)[0]
            step = step - (dz + 0.7 * dg).T @ gamma
        states.append(step)
    # 1e-6: the ridge, and the squares that the Gram matrix takes.
    assert np.abs(ours - np.array(states)).max() <= 1e-6
    assert np.abs(np.diff(ours, axis=0)).max(1).min() >= 1e-5  # all of them moved more than that


@pytest.mark.parametrize("memory", [3, 20])
def test_broyden_iterates_are_those_of_a_dense_inverse_jacobian(memory):
    f, x = problem(norm=1.1)
    ours = iterates(f, x, BroydenSolver(memory=memory, beta=0.7, max_halvings=0, max_steps=10))
    weight, sample = f.weight.detach().numpy(), x[0].detach().numpy()
    z, updates = np.zeros(12), []
    g = np.tanh(weight @ z + sample) - z
    states = [z]
    for _ in range(9):
        inverse = -0.7 * np.eye(12) + sum(updates, np.zeros((12, 12)))
        dz = -inverse @ g
        z = z + dz
        g_next = np.tanh(weight @ z + sample) - z
        dg, g = g_next - g, g_next
        updates = [] if len(updates) == memory else updates
        inverse = -0.7 * np.eye(12) + sum(updates, np.zeros((12, 12)))
        updates.append(np.outer(dz - inverse @ dg, dz @ inverse) / (dz @ inverse @ dg))
        states.append(z)
    assert np.abs(ours - np.array(states)).max() <= 1e-10


@pytest.mark.parametrize(("norm", "rotation"), [(0.5, True), (0.99, False), (1.5, True), (3.0, False)])
def test_affine_maps_end_after_as_many_steps_as_dimensions(norm, rotation):
    """Anderson is GMRES there (dim + 1 steps), Broyden ends after 2 dim (Gay 1979); plain iteration diverges."""
    x = inputs(4, 5)
    # 1e-8 and two steps more: rounding, which the Gram matrix squares.
    for solver, most in (
        (AndersonSolver(memory=5, ridge=1e-12, max_steps=40, rtol=1e-8), 5 + 1 + 2),
        (BroydenSolver(max_steps=40, rtol=1e-8, max_halvings=0), 2 * 5 + 2),
    ):
        f = Affine(norm, rotation=rotation)
        solution = solve(f, x, solver, BPTT)
        assert solution.stats.converged.all()
        assert int(solution.stats.num_steps.max()) <= most
        assert relative_error(solution.value, f.fixed_point(x)) <= 1e-6
    if norm == 3.0:
        assert not solve(Affine(norm), x, PicardSolver(max_steps=40, rtol=1e-8), BPTT).stats.converged.any()


def test_relative_ridge_knows_no_unit_and_the_released_absolute_one_does():
    """An affine map in other units is the same map: the iterates must scale with it."""

    def scaled_value(ridge_scale, unit):
        solver = AndersonSolver(memory=3, ridge=1e-6, ridge_scale=ridge_scale, max_steps=7)
        return solve(Affine(0.9), unit * inputs(3, 5), solver, BPTT).value / unit

    for unit in (1e-9, 1e9):
        assert relative_error(scaled_value("relative", unit), scaled_value("relative", 1.0)) <= 1e-9
    assert relative_error(scaled_value("absolute", 1e-9), scaled_value("absolute", 1.0)) >= 1e-3


@with_solver
def test_gradient_through_the_iterates_passes_gradcheck(solver):
    weight = TanhMap(0.9, dim=3).weight.detach().requires_grad_()
    x, z0 = inputs(2, 3), (0.1 * inputs(2, 3)).detach().requires_grad_()
    fixed = replace(solver, rtol=0.0, max_steps=5)

    def value(weight, x, z0):
        return solve(lambda z, x: torch.tanh(z @ weight.T + x), x, fixed, BPTT, z0).value

    assert torch.autograd.gradcheck(value, (weight, x, z0), eps=1e-6, atol=1e-6)


@with_solver
def test_sample_that_starts_at_its_fixed_point_has_finite_gradients(solver):
    """Residual exactly 0: nothing may be divided by it, in either pass."""
    for rtol in (1e-6, 0.0):
        f, x = problem()
        x.data[1] = 0
        value = solve(f, x, replace(solver, rtol=rtol, max_steps=9), BPTT).value
        assert torch.equal(value[1], torch.zeros(12, dtype=torch.float64))
        gradient = gradients(value, x, f.weight)
        assert gradient.isfinite().all()
        assert gradient.norm() > 0


@with_both
def test_autocast_does_not_reach_the_solver(make):
    """f has no operation that autocast lowers: every bit must be as without it."""
    x = inputs(4, 8).detach().float()
    run = lambda: solve(lambda z, x: torch.tanh(0.9 * z.roll(1, 1) + x), x, make(max_steps=8), BPTT).value  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        lowered = run()
    assert torch.equal(lowered, run())


@with_both
def test_half_precision_states_are_mixed_in_float32(make):
    x, f = inputs(4, 8).detach().bfloat16(), lambda z, x: torch.tanh(0.5 * z + x)
    value = solve(f, x, make(max_steps=8), BPTT).value
    exact = solve(f, x.double(), PicardSolver(max_steps=60), BPTT).value
    assert value.dtype == torch.bfloat16
    assert relative_error(value.double(), exact) <= 2e-2  # f itself has 8 bits


@pytest.mark.parametrize(("dtype", "dim", "tolerance"), [(torch.float64, 6, 1e-12), (torch.float32, 32, 1e-5)])
@with_both
def test_gradient_through_steps_at_rounding_level_stays_that_of_the_fixed_point(make, dtype, dim, tolerance):
    """Weights fitted to rounding errors made it grow to 1e28 in float64, and NaN in float32."""
    f, x = TanhMap(0.9, dim=dim).to(dtype), inputs(4, dim).detach().to(dtype).requires_grad_()
    plain = gradients(solve(f, x, PicardSolver(max_steps=250), BPTT).value, x, f.weight)
    gradient = gradients(solve(f, x, make(max_steps=70), BPTT).value, x, f.weight)
    assert relative_error(gradient, plain) <= tolerance


# Broyden's line search, and where there is nothing to be found


def arctan_map(z: Tensor, x: Tensor) -> Tensor:
    """f(z) - z = -x * arctan(z): the root is 0; with x = 5 full steps jump over it, further each time at first."""
    return z - x * torch.arctan(z)


@pytest.mark.parametrize("memory", [1, 16])
def test_line_search_halves_until_the_residual_falls(memory):
    x, z0 = torch.full((1, 1), 8.0, dtype=torch.float64), torch.full((1, 1), 5.0, dtype=torch.float64)
    points = iterates(arctan_map, x, BroydenSolver(max_steps=7, max_halvings=8, memory=memory), z0)[:, 0]
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
    x = torch.tensor([[30.0], [3.0]], dtype=torch.float64)
    z0 = torch.full((2, 1), 2.0, dtype=torch.float64)
    searched = solve(arctan_map, x, BroydenSolver(max_steps=40, atol=1e-9, max_halvings=10), BPTT, z0)
    assert searched.stats.converged.all()
    assert searched.value.abs().max() <= 1e-8
    # One halving is not enough for the first sample: the step is then taken as it is, and nothing hangs.
    points = iterates(arctan_map, x, BroydenSolver(max_steps=4, max_halvings=1), z0[:1])[:, 0]
    assert np.isclose(points[2] - points[0], (points[1] - points[0]) / 2)  # refused, halved
    assert not np.isclose(points[3] - points[0], (points[1] - points[0]) / 4)  # accepted all the same


def test_block_without_a_fixed_point_does_not_pass_for_converged():
    """A pre-norm block adds about as much at every size: far out its relative residual is small."""
    torch.manual_seed(0)
    f, x = AttentionBlock(64, 4), torch.randn(8, 32, 64)
    with torch.no_grad():
        for solver in (BroydenSolver(max_steps=25, rtol=1e-3), AndersonSolver(max_steps=25, rtol=1e-3)):
            solution = solve(f, x, solver, BPTT)
            assert not solution.stats.converged.any()
            assert solution.value.abs().max() < 100
        # The twin: what the line search is there for.
        ran_away = solve(f, x, BroydenSolver(max_steps=25, rtol=1e-3, max_halvings=0), BPTT)
        assert ran_away.stats.converged.all()
        assert ran_away.value.abs().amax((1, 2)).median() > 1000


@with_both
def test_map_without_a_fixed_point_is_an_error_or_not_converged(make):
    """f(z) = exp(z): no fixed point on the real line."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    with contextlib.suppress(DivergenceError):
        assert not solve(lambda z, x: z.exp() + x, x, make(max_steps=30, rtol=1e-6), BPTT).stats.converged.any()
