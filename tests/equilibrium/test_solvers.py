"""Solvers: fixed points against closed forms, counts of evaluations, and stopping."""

import pytest
import torch
from torch import Tensor, nn

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    EquilibriumLayer,
    FixedPointSolution,
    MomentumSolver,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    solve_fixed_point,
)
from tests.helpers.equilibrium import AttentionBlock, TanhMap, gradients, inputs, relative_error


class Affine(nn.Module):
    """f(z, x) = A z + x with a symmetric A of the given norm: the fixed point is (I - A)^-1 x."""

    def __init__(self, dim: int = 5, norm: float = 0.7) -> None:
        super().__init__()
        orthogonal = torch.linalg.qr(
            torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )[0]
        eigenvalues = torch.linspace(-norm, norm, dim, dtype=torch.float64)
        self.weight = nn.Parameter(orthogonal @ torch.diag(eigenvalues) @ orthogonal.T)
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return z @ self.weight.T + x


def affine_problem(batch: int = 4):
    f = Affine()
    x = torch.randn(batch, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return f, torch.zeros(batch, 5, dtype=torch.float64), x


EVERY_SOLVER = [
    PicardSolver(max_steps=200, rtol=1e-8),
    RelaxedSolver(beta=0.9, max_steps=200, rtol=1e-8),
    ReversibleSolver(beta=0.8, max_steps=200, rtol=1e-8),
    ReversibleSolver(beta=1.2, max_steps=200, rtol=1e-8),
    MomentumSolver(beta=1.0, momentum=0.125, max_steps=200, rtol=1e-8),
    MomentumSolver(beta=0.8, momentum=-0.25, max_steps=200, rtol=1e-8),
    AndersonSolver(max_steps=200, rtol=1e-8),
    AndersonSolver(memory=1, beta=0.8, max_steps=200, rtol=1e-8),
    BroydenSolver(max_steps=200, rtol=1e-8),
    BroydenSolver(memory=2, beta=0.8, max_halvings=2, max_steps=200, rtol=1e-8),
]


@pytest.mark.parametrize("solver", EVERY_SOLVER, ids=str)
def test_fixed_point_and_gradient_match_the_closed_form(solver):
    f, z0, x = affine_problem()
    two_step = isinstance(solver, ReversibleSolver | MomentumSolver)
    adjoint = ReversibleAdjoint() if two_step else BackpropAdjoint()
    value = solve_fixed_point(f, z0, x, solver=solver, adjoint=adjoint).value
    inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - f.weight)
    closed_form = x @ inverse.T
    # 1e-7: the solvers stop at a relative residual of 1e-8; the gradient is that of the truncated iteration.
    assert relative_error(value, closed_form) <= 1e-7
    assert relative_error(gradients(value, x), gradients(closed_form, x)) <= 1e-6


@pytest.mark.parametrize("num_steps", [1, 2, 5, 30])
@pytest.mark.parametrize("arithmetic", ["exact", "float64", "float32"])
@pytest.mark.parametrize("make", [ReversibleSolver, MomentumSolver])
def test_evaluations_without_a_tolerance_are_counted_by_f_itself(make, arithmetic, num_steps):
    f, z0, x = affine_problem()
    solver = make(max_steps=num_steps, arithmetic=arithmetic)
    expected = num_steps * (2 if make is ReversibleSolver else 1)
    solution = solve_fixed_point(f, z0, x, solver=solver, adjoint=ReversibleAdjoint())
    assert f.calls == expected == solution.stats.forward_nfe
    assert solution.stats.backward_nfe is None
    solution.value.sum().backward()
    assert f.calls == 2 * expected
    assert solution.stats.backward_nfe == expected
    assert solution.stats.num_steps.tolist() == [num_steps] * 4


@pytest.mark.parametrize("make", [ReversibleSolver, MomentumSolver])
def test_evaluations_with_a_tolerance_are_one_more_forward_and_none_more_backward(make):
    f, z0, x = affine_problem()
    solution = solve_fixed_point(f, z0, x, solver=make(max_steps=50, rtol=1e-3), adjoint=ReversibleAdjoint())
    made = int(solution.stats.num_steps.max()) * (2 if make is ReversibleSolver else 1)
    assert 2 < int(solution.stats.num_steps.max()) < 50
    assert f.calls == made + 1 == solution.stats.forward_nfe
    solution.value.sum().backward()
    assert f.calls == 2 * made + 1
    assert solution.stats.backward_nfe == made


def test_max_steps_is_reached_with_a_tolerance_that_is_never_met():
    f, z0, x = affine_problem()
    solution = solve_fixed_point(
        f, z0, x, solver=ReversibleSolver(max_steps=3, rtol=1e-12), adjoint=ReversibleAdjoint()
    )
    assert solution.stats.num_steps.tolist() == [3] * 4
    assert solution.stats.converged.tolist() == [False] * 4
    assert f.calls == 7


@pytest.mark.parametrize(
    "make", [ReversibleSolver, MomentumSolver, RelaxedSolver, PicardSolver, AndersonSolver, BroydenSolver]
)
def test_relative_residual_is_that_of_the_returned_state(make):
    f, z0, x = affine_problem()
    solution = solve_fixed_point(f, z0, x, solver=make(max_steps=50, rtol=1e-3), adjoint=BackpropAdjoint())
    value = f(solution.value, x)
    expected = (value - solution.value).norm(dim=1) / (value.norm(dim=1) + 1e-5)
    assert torch.allclose(solution.stats.relative_residual, expected, rtol=1e-6)
    assert (expected <= 1e-3).all()
    assert solution.stats.converged.tolist() == [True] * 4


SPREAD = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e3])


def spread_problem():
    """Samples that need different numbers of steps."""
    torch.manual_seed(0)
    f = nn.Bilinear(4, 4, 4).double()
    f.weight.data *= 0.6
    x = torch.randn(5, 4, dtype=torch.float64) * SPREAD[:, None]

    class Tanh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = f

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(z, torch.tanh(x))) + torch.tanh(x)

    return Tanh(), torch.zeros(5, 4, dtype=torch.float64), x.requires_grad_()


STOPPING = [ReversibleSolver(beta=0.8, max_steps=40, rtol=1e-4), MomentumSolver(momentum=0.25, max_steps=60, rtol=1e-4)]


@pytest.mark.parametrize(
    "solver",
    [
        *STOPPING,
        RelaxedSolver(max_steps=60, atol=1e-4),
        PicardSolver(max_steps=60, rtol=1e-4),
        AndersonSolver(max_steps=60, rtol=1e-4),
        BroydenSolver(max_steps=60, rtol=1e-4),
        BroydenSolver(max_steps=60, rtol=1e-4, memory=2, max_halvings=3),
    ],
    ids=str,
)
def test_a_stopped_sample_does_not_depend_on_its_neighbours(solver):
    f, z0, x = spread_problem()
    together = solve_fixed_point(f, z0, x, solver=solver, adjoint=BackpropAdjoint())
    assert len(set(together.stats.num_steps.tolist())) > 2
    for i in range(5):
        alone = solve_fixed_point(f, z0[i : i + 1], x[i : i + 1], solver=solver, adjoint=BackpropAdjoint())
        assert alone.stats.num_steps.tolist() == together.stats.num_steps[i : i + 1].tolist()
        # 1e-9: a batch of one may take another matrix kernel; the exact state rounds to 2^-32.
        assert torch.allclose(alone.value[0], together.value[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("solver", STOPPING, ids=str)
def test_backward_undoes_just_the_steps_that_each_sample_made(solver, interval, monkeypatch):
    monkeypatch.setattr("revdeq_lightning.equilibrium.loop.host_check_interval", lambda device: interval)
    f, z0, x = spread_problem()
    z0.requires_grad_()
    sources = (x, z0, *f.parameters())
    solution = solve_fixed_point(f, z0, x, solver=solver, adjoint=ReversibleAdjoint(mismatch="raise"))
    ours = gradients(solution.value, *sources)
    assert solution.stats.reconstruction_mismatch == 0

    # The oracle: each sample alone, with its own fixed number of steps, back-propagated through a plain loop.
    values = []
    for i, num_steps in enumerate(solution.stats.num_steps.tolist()):
        previous = u = z0[i : i + 1]
        if isinstance(solver, ReversibleSolver):
            for _ in range(num_steps):
                previous = (1 - solver.beta) * previous + solver.beta * f(u, x[i : i + 1])
                u = (1 - solver.beta) * u + solver.beta * f(previous, x[i : i + 1])
        else:
            for _ in range(num_steps):
                step = solver.beta * (f(u, x[i : i + 1]) - u) + solver.momentum * (u - previous)
                previous, u = u, u + step
        values.append(u)
    assert relative_error(solution.value, torch.cat(values)) <= 1e-8  # the exact state rounds to 2^-32
    assert relative_error(ours, gradients(torch.cat(values), *sources)) <= 1e-8


def test_layer_returns_a_named_tuple_and_starts_from_zeros_by_default():
    torch.manual_seed(0)
    layer = EquilibriumLayer(AttentionBlock(), solver=ReversibleSolver(max_steps=2), adjoint=ReversibleAdjoint())
    x = torch.randn(2, 5, 32)
    solution = layer(x)
    assert isinstance(solution, FixedPointSolution)
    assert isinstance(solution, tuple)
    assert torch.equal(solution.value, layer(x, z0=torch.zeros_like(x)).value)
    assert not torch.equal(solution.value, layer(x, z0=torch.ones_like(x)).value)
    assert "ReversibleSolver" in repr(layer)


def test_pytree_state_equals_the_joined_tensor():
    """Two coupled affine parts as a dict against the same map on one tensor."""
    f, z0, x = affine_problem()
    z0 = z0 + 0.3

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joined = f

        def forward(self, z, x):
            value = self.joined(torch.cat([z["a"], z["b"]], 1), torch.cat(x["parts"], 1))
            return {"a": value[:, :2], "b": value[:, 2:]}

    solver = ReversibleSolver(beta=0.8, max_steps=6)
    joined = solve_fixed_point(f, z0, x, solver=solver, adjoint=ReversibleAdjoint()).value
    split_x = {"parts": (x[:, :1], x[:, 1:]), "label": "not a tensor"}
    split = solve_fixed_point(
        Split(), {"a": z0[:, :2], "b": z0[:, 2:]}, split_x, solver=solver, adjoint=ReversibleAdjoint(mismatch="raise")
    ).value
    assert set(split) == {"a", "b"}
    value = torch.cat([split["a"], split["b"]], 1)
    assert torch.equal(value, joined)
    assert relative_error(gradients(value, x, f.weight), gradients(joined, x, f.weight)) <= 1e-14


def test_a_layer_solves_with_other_settings_in_one_call():
    f = TanhMap()
    layer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=4))
    x = inputs()
    longer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=9))(x)
    assert torch.equal(layer(x, max_steps=9).value, longer.value)
    assert layer(x).stats.forward_nfe == 4
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        layer(x, max_steps=0)
