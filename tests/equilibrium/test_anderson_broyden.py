"""AndersonSolver and BroydenSolver against SciPy, dense linear algebra in NumPy, closed forms and counts of calls."""

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    PicardSolver,
    RelaxedSolver,
    solve_fixed_point,
)
from tests.helpers.equilibrium import gradients, relative_error

SOLVERS = [
    AndersonSolver(max_steps=60, rtol=1e-12),
    AndersonSolver(max_steps=60, rtol=1e-12, memory=3, beta=0.8),
    BroydenSolver(max_steps=60, rtol=1e-12),
    BroydenSolver(max_steps=60, rtol=1e-12, max_halvings=0),
    BroydenSolver(max_steps=60, rtol=1e-12, memory=4, beta=0.8, max_halvings=3),
]

with_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)


class TanhMap(nn.Module):
    """f(z, x) = tanh(W z + x), W random of the given norm."""

    def __init__(self, dim: int = 12, norm: float = 0.9) -> None:
        super().__init__()
        weight = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(norm * weight / torch.linalg.matrix_norm(weight, 2))
        self.inputs: list[Tensor] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.inputs.append(z.detach().clone())
        return torch.tanh(z @ self.weight.T + x)


def inputs(batch: int = 3, dim: int = 12) -> Tensor:
    return torch.randn(batch, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def solve(f, x, solver, z0=None):
    return solve_fixed_point(f, torch.zeros_like(x) if z0 is None else z0, x, solver=solver, adjoint=BackpropAdjoint())


@with_solver
@pytest.mark.parametrize("method", ["anderson", "broyden1"])
def test_fixed_point_is_that_of_scipy(solver, method):
    f, x = TanhMap(), inputs()
    value = solve(f, x, solver).value
    weight = f.weight.detach().numpy()
    for i, sample in enumerate(x.numpy()):
        found = optimize.root(
            lambda z, sample=sample: np.tanh(weight @ z + sample) - z,
            np.zeros(12),
            method=method,
            options={"fatol": 1e-11, "maxiter": 200},
        )
        assert found.success
        assert relative_error(value[i], torch.from_numpy(found.x)) <= 1e-10  # both stop at residuals of 1e-11


def iterates(f, x, solver, num_steps):
    """What f was evaluated at, `(step, dim)`, for a batch of one."""
    f.inputs.clear()
    solve(f, x[:1], solver(max_steps=num_steps))
    return torch.cat(f.inputs).numpy()


def test_anderson_iterates_are_those_of_dense_least_squares():
    f, x = TanhMap(), inputs()
    ours = iterates(f, x, lambda **steps: AndersonSolver(memory=4, beta=0.7, ridge=1e-14, **steps), 9)
    weight, sample = f.weight.detach().numpy(), x[0].numpy()
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
    f, x = TanhMap(norm=1.1), inputs()
    ours = iterates(f, x, lambda **steps: BroydenSolver(memory=memory, beta=0.7, max_halvings=0, **steps), 10)
    weight, sample = f.weight.detach().numpy(), x[0].numpy()
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


class Affine(nn.Module):
    """f(z, x) = A z + x with eigenvalues between -norm and norm, and complex ones with `rotation`."""

    def __init__(self, norm: float, dim: int = 5, rotation: bool = False) -> None:
        super().__init__()
        orthogonal = torch.linalg.qr(
            torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )[0]
        middle = torch.diag(torch.linspace(-norm, norm, dim, dtype=torch.float64))
        self.weight = nn.Parameter(norm * orthogonal if rotation else orthogonal @ middle @ orthogonal.T)
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return z @ self.weight.T + x

    def fixed_point(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.inv(torch.eye(len(self.weight), dtype=x.dtype) - self.weight).T


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("norm", [0.5, 0.99, 1.5, 3.0])
def test_affine_maps_end_after_as_many_steps_as_dimensions(norm, rotation):
    """Anderson is GMRES there (dim + 1 steps), Broyden ends after 2 dim (Gay 1979); plain iteration diverges."""
    x = inputs(4, 5)
    # 1e-8 and two steps more: rounding, which the Gram matrix squares.
    for solver, most in (
        (AndersonSolver(memory=5, ridge=1e-12, max_steps=40, rtol=1e-8), 5 + 1 + 2),
        (BroydenSolver(max_steps=40, rtol=1e-8, max_halvings=0), 2 * 5 + 2),
    ):
        f = Affine(norm, rotation=rotation)
        solution = solve(f, x, solver)
        assert solution.stats.converged.all()
        assert int(solution.stats.num_steps.max()) <= most
        assert f.calls == int(solution.stats.num_steps.max()) + 1 == solution.stats.forward_nfe
        assert relative_error(solution.value, f.fixed_point(x)) <= 1e-6
    if norm > 1 and not rotation:
        stats = solve(Affine(norm), x, PicardSolver(max_steps=40, rtol=1e-8)).stats
        assert not stats.converged.any()


@with_solver
def test_acceleration_takes_fewer_evaluations_than_plain_iteration(solver):
    f, x = Affine(0.95, dim=12), inputs()
    plain = solve(f, x, PicardSolver(max_steps=1000, rtol=1e-8)).stats
    fast = solve(f, x, solver.__class__(**{**vars(solver), "rtol": 1e-8, "max_steps": 200})).stats
    assert plain.converged.all()
    assert fast.converged.all()
    assert fast.forward_nfe < plain.forward_nfe / 2


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("make", [AndersonSolver, BroydenSolver])
def test_evaluations_are_counted_by_f_itself(make, num_steps):
    f, x = TanhMap(), inputs()
    stats = solve(f, x, make(max_steps=num_steps)).stats
    assert len(f.inputs) == num_steps == stats.forward_nfe
    assert stats.num_steps.tolist() == [num_steps] * 3
    assert stats.converged is None


def test_first_steps_are_those_of_relaxation():
    f, x = TanhMap(), inputs()
    for make in (AndersonSolver, BroydenSolver):
        assert torch.equal(
            solve(f, x, make(beta=0.7, max_steps=1)).value, solve(f, x, RelaxedSolver(beta=0.7, max_steps=1)).value
        ) or torch.allclose(  # z + beta * g and (1 - beta) * z + beta * f round differently
            solve(f, x, make(beta=0.7, max_steps=1)).value,
            solve(f, x, RelaxedSolver(beta=0.7, max_steps=1)).value,
            rtol=1e-14,
            atol=0,
        )


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_relative_ridge_knows_no_unit_and_the_released_absolute_one_does(unit):
    """An affine map in other units is the same map: the iterates must scale with it."""

    def scaled_value(ridge_scale, unit):
        f, x = Affine(0.9), inputs(3, 5)
        solver = AndersonSolver(memory=3, ridge=1e-6, ridge_scale=ridge_scale, max_steps=7)
        return solve(f, unit * x, solver).value / unit

    assert relative_error(scaled_value("relative", unit), scaled_value("relative", 1.0)) <= 1e-9
    if unit < 1:
        assert relative_error(scaled_value("absolute", unit), scaled_value("absolute", 1.0)) >= 1e-3


def test_released_absolute_ridge_stalls_where_the_relative_one_does_not():
    f, x = TanhMap(norm=0.95), inputs()
    steps = {
        scale: int(
            solve(f, x, AndersonSolver(ridge=1e-6, ridge_scale=scale, max_steps=200, rtol=1e-9)).stats.num_steps.max()
        )
        for scale in ("relative", "absolute")
    }
    plain = int(solve(f, x, PicardSolver(max_steps=200, rtol=1e-9)).stats.num_steps.max())
    assert steps["relative"] < plain < steps["absolute"]


@with_solver
def test_gradient_through_the_iterates_passes_gradcheck(solver):
    weight = TanhMap(4).weight.detach().requires_grad_()
    x, z0 = inputs(2, 4).requires_grad_(), (0.1 * inputs(2, 4)).requires_grad_()
    fixed = solver.__class__(**{**vars(solver), "rtol": 0.0, "max_steps": 5})

    def value(weight, x, z0):
        return solve(lambda z, x: torch.tanh(z @ weight.T + x), x, fixed, z0).value

    assert torch.autograd.gradcheck(value, (weight, x, z0), eps=1e-6, atol=1e-6)


@with_solver
def test_sample_that_starts_at_its_fixed_point_has_finite_gradients(solver):
    """Residual exactly 0: nothing may be divided by it, in either pass."""
    for has_tolerance in (True, False):
        fixed = solver.__class__(**{**vars(solver), "rtol": 1e-6 if has_tolerance else 0.0, "max_steps": 9})
        f, x = TanhMap(), inputs()
        x[1] = 0
        value = solve(f, x.requires_grad_(), fixed).value
        assert torch.equal(value[1], torch.zeros(12, dtype=torch.float64))
        gradient = gradients(value, x, f.weight)
        assert gradient.isfinite().all()
        assert gradient.norm() > 0


def test_all_samples_converged_to_the_bit_and_stepped_on():
    f, x = Affine(0.3), inputs(3, 5)
    for solver in (AndersonSolver(max_steps=60), BroydenSolver(max_steps=60)):
        value = solve(f, x, solver).value
        assert relative_error(value, f.fixed_point(x)) <= 1e-12


@pytest.mark.parametrize("make", [AndersonSolver, BroydenSolver])
def test_state_of_several_tensors_is_one_vector(make):
    """A dict of a scalar a sample and a matrix against the same map on one tensor."""
    f, x = TanhMap(5), inputs(3, 5)
    solver = make(max_steps=8, rtol=1e-3)

    def split(z, x):
        value = f(torch.cat([z["a"][:, None], z["b"].flatten(1)], 1), x)
        return {"a": value[:, 0], "b": value[:, 1:].view(-1, 2, 2)}

    z0 = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(3, 2, 2, dtype=torch.float64)}
    joined, parts = solve(f, x, make(max_steps=6)).value, solve(split, x, make(max_steps=6), z0).value
    assert torch.equal(torch.cat([parts["a"][:, None], parts["b"].flatten(1)], 1), joined)
    assert solve(split, x, solver, z0).stats.converged.all()


@pytest.mark.parametrize("make", [AndersonSolver, BroydenSolver])
def test_autocast_does_not_reach_the_solver(make):
    """f has no operation that autocast lowers: every bit must be as without it."""
    x = inputs(4, 8).float()
    run = lambda: solve(lambda z, x: torch.tanh(0.9 * z.roll(1, 1) + x), x, make(max_steps=8)).value  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        lowered = run()
    assert torch.equal(lowered, run())


@pytest.mark.parametrize("make", [AndersonSolver, BroydenSolver])
def test_half_precision_states_are_mixed_in_float32(make):
    x = inputs(4, 8).bfloat16()
    value = solve(lambda z, x: torch.tanh(0.5 * z + x), x, make(max_steps=8)).value
    exact = solve(lambda z, x: torch.tanh(0.5 * z + x), x.double(), PicardSolver(max_steps=60)).value
    assert value.dtype == torch.bfloat16
    assert relative_error(value.double(), exact) <= 2e-2  # f itself has 8 bits


@pytest.mark.parametrize("dim", [6, 32])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("make", [AndersonSolver, BroydenSolver])
def test_gradient_through_steps_at_rounding_level_stays_that_of_the_fixed_point(make, dtype, tolerance, dim):
    """Weights fitted to rounding errors made it grow to 1e28 in float64, and NaN in float32."""
    f, x = TanhMap(dim).to(dtype), inputs(4, dim).to(dtype).requires_grad_()
    plain = gradients(solve(f, x, PicardSolver(max_steps=300)).value, x, f.weight)
    for num_steps in (40, 80):
        gradient = gradients(solve(f, x, make(max_steps=num_steps)).value, x, f.weight)
        assert relative_error(gradient, plain) <= tolerance
