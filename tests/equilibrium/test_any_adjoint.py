"""Implicit and phantom gradients with any solver, in any surroundings."""

import torch
from torch import nn

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from tests.helpers.equilibrium import (
    EVERY_ADJOINT,
    IMPLICIT,
    TanhMap,
    gradients,
    inputs,
    project,
    relative_error,
    solve,
    with_adjoint,
    with_every_solver,
)


@with_every_solver
def test_any_solver_with_any_adjoint(make):
    f, x = TanhMap(), inputs()
    for has_tolerance in (True, False):
        solver = make(max_steps=80, rtol=1e-8) if has_tolerance else make(max_steps=80)
        is_two_step = make in (ReversibleSolver, MomentumSolver)
        adjoints = [a for a in EVERY_ADJOINT.values() if is_two_step or not isinstance(a, ReversibleAdjoint)]
        solutions = [solve(f, x, solver, adjoint) for adjoint in adjoints]
        grads = [gradients(solution.value, x, f.weight) for solution in solutions]
        for adjoint, solution, gradient in zip(adjoints, solutions, grads, strict=True):
            assert torch.equal(solution.value, solutions[0].value), adjoint
            # 1e-5: of an iteration that stops at 1e-8; the phantom is 10 steps of relaxation.
            bound = 0.2 if isinstance(adjoint, PhantomAdjoint) else 1e-5
            assert relative_error(gradient, grads[0]) <= bound, adjoint


@with_adjoint
def test_closures_and_learnt_initial_states(adjoint):
    """f may use any tensor; z0 gets zeros, not None, which DDP would take for an unused parameter."""
    weight, scale = TanhMap().weight, torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True)
    x, z0 = inputs(), torch.full((3, 6), 0.1, dtype=torch.float64, requires_grad=True)

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = weight, nn.Parameter(scale.detach().clone())

        def forward(self, z, x):
            return torch.tanh(z @ self.weight.T * self.scale + x)

    owner = Owner()
    closure = solve(lambda z, x: torch.tanh(z @ weight.T * scale + x), x, PicardSolver(max_steps=50), adjoint, z0).value
    owned = solve(owner, x, PicardSolver(max_steps=50), adjoint, z0).value
    ours = gradients(closure, x, scale, z0)
    assert torch.equal(ours, gradients(owned, x, owner.scale, z0))
    assert not ours[-z0.numel() :].any()


@with_adjoint
def test_pytree_state_equals_the_joined_tensor(adjoint):
    f, x = TanhMap(), inputs()
    split = lambda z, x: dict(zip("ab", f(torch.cat([z["a"], z["b"]], 1), x).split([2, 4], 1), strict=True))  # noqa: E731
    z0 = {"a": torch.zeros(3, 2, dtype=torch.float64), "b": torch.zeros(3, 4, dtype=torch.float64)}
    parts = solve(split, x, AndersonSolver(max_steps=30), adjoint, z0).value
    joined = solve(f, x, AndersonSolver(max_steps=30), adjoint).value
    assert torch.equal(torch.cat([parts["a"], parts["b"]], 1), joined)
    # Only one of the leaves in the loss, and both.
    for ours, expected in ((parts["a"], joined[:, :2]), (torch.cat([parts["a"], parts["b"]], 1), joined)):
        grads = [torch.autograd.grad(project(value), (x, f.weight), retain_graph=True) for value in (ours, expected)]
        for a, b in zip(*grads, strict=True):
            assert relative_error(a, b) <= 1e-9  # the linear solve stops at 1e-10


@with_adjoint
def test_map_that_does_not_use_its_state_or_its_input(adjoint):
    x = inputs()
    value = solve(lambda z, x: 2 * x, x, PicardSolver(max_steps=3), adjoint).value
    weight = 1.0 if adjoint is IMPLICIT else 1 - 0.2**10  # the sum of ten steps
    assert torch.allclose(torch.autograd.grad(value.sum(), x)[0], torch.full_like(x, 2 * weight))
    bias = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
    value = solve(lambda z, _: 0.5 * z + bias, x, PicardSolver(max_steps=60), adjoint).value
    assert torch.autograd.grad(value.sum(), x, allow_unused=True, retain_graph=True)[0] is None
    assert (torch.autograd.grad(value.sum(), bias)[0] > 1).all()
