"""Solvers: fixed points and gradients against closed forms, counts of evaluations, and stopping."""

import pytest
import torch
from torch import Tensor, nn

from revdeq_lightning.equilibrium import (
    AndersonSolver,
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
from tests.helpers.equilibrium import (
    BPTT,
    REVERSIBLE,
    Affine,
    AttentionBlock,
    TanhMap,
    gradients,
    inputs,
    relative_error,
    solve,
    with_every_solver,
)


def exact_adjoint(solver):
    """The reversible one where it can be had."""
    return REVERSIBLE if isinstance(solver, ReversibleSolver | MomentumSolver) else BPTT


@pytest.mark.parametrize(
    "solver",
    [
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
    ],
    ids=str,
)
def test_fixed_point_and_gradient_match_the_closed_form(solver):
    f, x = Affine(), inputs(4, 5)
    value, closed_form = solve(f, x, solver, exact_adjoint(solver)).value, f.fixed_point(x)
    # 1e-7: the solvers stop at a relative residual of 1e-8; the gradient is that of the truncated iteration.
    assert relative_error(value, closed_form) <= 1e-7
    assert relative_error(gradients(value, x), gradients(closed_form, x)) <= 1e-6


@pytest.mark.parametrize("num_steps", [1, 5])
@with_every_solver
def test_evaluations_without_a_tolerance_are_counted_by_f_itself(make, num_steps):
    f, x, solver = Affine(), inputs(4, 5), make(max_steps=num_steps)
    expected = num_steps * (2 if make is ReversibleSolver else 1)
    solution = solve(f, x, solver, exact_adjoint(solver))
    assert f.calls == expected == solution.stats.forward_nfe
    assert solution.stats.num_steps.tolist() == [num_steps] * 4
    assert solution.stats.converged is None
    assert solution.stats.backward_nfe is None
    solution.value.sum().backward()
    repeated = expected if exact_adjoint(solver) is REVERSIBLE else 0
    assert f.calls == expected + repeated
    assert solution.stats.backward_nfe == (repeated or None)


@with_every_solver
def test_a_tolerance_takes_one_evaluation_more_that_tells_the_residual_of_the_returned_state(make):
    f, x = Affine(), inputs(4, 5)
    for rtol in (1e-3, 1e-12):
        solver = make(max_steps=50 if rtol == 1e-3 else 3, rtol=rtol)
        f.calls = 0
        solution = solve(f, x, solver, exact_adjoint(solver))
        stats, most = solution.stats, int(solution.stats.num_steps.max())
        made = most * (2 if make is ReversibleSolver else 1)
        assert 2 < most < 50
        assert f.calls == made + 1 == stats.forward_nfe
        solution.value.sum().backward()
        assert f.calls == made + 1 + (stats.backward_nfe or 0)
        assert stats.backward_nfe == (made if exact_adjoint(solver) is REVERSIBLE else None)
        value = f(solution.value, x)
        expected = (value - solution.value).norm(dim=1) / (value.norm(dim=1) + 1e-5)
        assert torch.allclose(stats.relative_residual, expected, rtol=1e-6)
        assert torch.equal(stats.converged, expected <= rtol)
        assert stats.converged.tolist() == [rtol == 1e-3] * 4
        assert rtol == 1e-3 or stats.num_steps.tolist() == [3] * 4


class Spread(nn.Module):
    """Samples that need different numbers of steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Bilinear(4, 4, 4).double()
        self.inner.weight.data *= 0.6

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z, torch.tanh(x))) + torch.tanh(x)


def spread_problem():
    sizes = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e3])[:, None]
    f = Spread()
    x = torch.randn(5, 4, dtype=torch.float64) * sizes
    return f, torch.zeros(5, 4, dtype=torch.float64, requires_grad=True), x.requires_grad_()


STOPPING = [ReversibleSolver(beta=0.8, max_steps=40, rtol=1e-4), MomentumSolver(momentum=0.25, max_steps=60, rtol=1e-4)]


@pytest.mark.parametrize(
    "solver",
    [
        *STOPPING,
        RelaxedSolver(max_steps=60, atol=1e-4),
        PicardSolver(max_steps=60, rtol=1e-4),
        AndersonSolver(max_steps=60, rtol=1e-4),
        BroydenSolver(max_steps=60, rtol=1e-4, memory=2, max_halvings=3),
    ],
    ids=str,
)
def test_a_stopped_sample_does_not_depend_on_its_neighbours(solver):
    f, _, x = spread_problem()
    together = solve(f, x, solver, BPTT)
    assert len(set(together.stats.num_steps.tolist())) > 2
    for i in range(5):
        alone = solve(f, x[i : i + 1], solver, BPTT)
        assert alone.stats.num_steps.tolist() == together.stats.num_steps[i : i + 1].tolist()
        # 1e-9: a batch of one may take another matrix kernel; the exact state rounds to 2^-32.
        assert torch.allclose(alone.value[0], together.value[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("solver", "interval"), [(STOPPING[0], 1), (STOPPING[0], 4), (STOPPING[1], 4)], ids=str)
def test_backward_undoes_just_the_steps_that_each_sample_made(solver, interval, monkeypatch):
    monkeypatch.setattr("revdeq_lightning.equilibrium.loop.host_check_interval", lambda device: interval)
    f, z0, x = spread_problem()
    sources = (x, z0, *f.parameters())
    solution = solve(f, x, solver, REVERSIBLE, z0)
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


@with_every_solver
def test_pytree_state_equals_the_joined_tensor(make):
    """A dict of a scalar a sample and a matrix, x a pytree, against the same map on one tensor."""
    f, x, z0 = Affine(), inputs(4, 5), inputs(4, 5) + 0.3

    def parts(joined):
        return {"a": joined[:, 0], "b": joined[:, 1:].view(-1, 2, 2)}

    def join(parts):
        return torch.cat([parts["a"][:, None], parts["b"].flatten(1)], 1)

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joined = f

        def forward(self, z, x):
            return parts(self.joined(join(z), torch.cat(x["parts"], 1)))

    def solve_split(solver):
        split_x = {"parts": (x[:, :1], x[:, 1:]), "label": "not a tensor"}
        return solve_fixed_point(Split(), parts(z0), split_x, solver=solver, adjoint=exact_adjoint(solver))

    solver = make(max_steps=6)
    joined, value = solve(f, x, solver, exact_adjoint(solver), z0).value, join(solve_split(solver).value)
    assert torch.equal(value, joined)
    assert relative_error(gradients(value, x, f.weight), gradients(joined, x, f.weight)) <= 1e-14
    stopped = solve_split(make(max_steps=60, rtol=1e-3))
    values = parts(f(join(stopped.value), x))
    worst = torch.stack([(values[k] - stopped.value[k]).view(4, -1).norm(dim=1) for k in "ab"]) / torch.stack(
        [values[k].view(4, -1).norm(dim=1) + 1e-5 for k in "ab"]
    )
    assert torch.allclose(stopped.stats.relative_residual, worst.amax(0), rtol=1e-6)  # every tensor for itself
    assert stopped.stats.converged.all()


def test_a_layer_solves_with_other_settings_in_one_call():
    f, x = TanhMap(), inputs()
    layer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=4))
    longer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=9))(x)
    assert torch.equal(layer(x, max_steps=9).value, longer.value)
    assert layer(x).stats.forward_nfe == 4
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        layer(x, max_steps=0)
