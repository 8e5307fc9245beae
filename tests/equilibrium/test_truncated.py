"""Truncated back-propagation through time against plain loops that detach the state, and integer counts."""

import pytest
import torch

from revdeq_lightning.equilibrium import BackpropAdjoint, MomentumSolver, PicardSolver, RelaxedSolver
from tests.helpers.equilibrium import TanhMap, gradients, inputs, relative_error, solve, with_every_solver


def truncated_loop(step, z, num_steps, num_recorded):
    """`z <- step(z, z before)`, cut off from its past where the recorded steps begin."""
    before = z
    for k in range(num_steps):
        if k == num_steps - num_recorded:
            z, before = z.detach(), before.detach()
        z, before = step(z, before), z
    return z


LOOPS = {
    "picard": (PicardSolver(max_steps=7), lambda f, x: lambda z, before: f(z, x)),
    "relaxed": (RelaxedSolver(max_steps=7, beta=0.6), lambda f, x: lambda z, before: 0.4 * z + 0.6 * f(z, x)),
    "momentum": (
        MomentumSolver(max_steps=7, beta=0.75, momentum=0.25, arithmetic="float64"),
        lambda f, x: lambda z, before: z + 0.75 * (f(z, x) - z) + 0.25 * (z - before),
    ),
}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("num_recorded", [1, 3, 7])
@pytest.mark.parametrize(("solver", "step"), LOOPS.values(), ids=LOOPS)
def test_truncated_gradient_is_that_of_a_loop_that_detaches(solver, step, num_recorded, checkpoint):
    f, x = TanhMap(norm=1.3), inputs()
    adjoint = BackpropAdjoint(num_evaluations=num_recorded, checkpoint=checkpoint)
    value = solve(f, x, solver, adjoint).value
    expected = truncated_loop(step(f, x), torch.zeros_like(x), 7, num_recorded)
    assert relative_error(value, expected) <= 1e-15
    ours, reference = gradients(value, x, f.weight), gradients(expected, x, f.weight)
    assert relative_error(ours, reference) <= 1e-14
    full = gradients(solve(f, x, solver, BackpropAdjoint()).value, x, f.weight)
    assert (relative_error(ours, full) <= 1e-14) == (num_recorded == 7)


@with_every_solver
def test_only_the_last_evaluations_are_differentiated(make):
    f, x = TanhMap(), inputs()
    z0 = torch.zeros_like(x).requires_grad_()
    solver = make(max_steps=6)
    solution = solve(f, x, solver, BackpropAdjoint(num_evaluations=2), z0)
    assert torch.equal(solution.value, solve(TanhMap(), x, solver, BackpropAdjoint()).value)
    assert f.calls == solution.stats.forward_nfe == 6 * solver.evaluations_per_step
    solution.value.sum().backward()
    assert f.backward_calls == 2
    assert torch.equal(z0.grad, torch.zeros_like(z0))
    assert torch.count_nonzero(x.grad)


def test_more_evaluations_than_there_are_is_the_exact_gradient():
    f, x = TanhMap(), inputs()
    z0 = 0.1 * inputs().detach().requires_grad_()
    more = solve(f, x, PicardSolver(max_steps=3), BackpropAdjoint(num_evaluations=9), z0).value
    exact = solve(f, x, PicardSolver(max_steps=3), BackpropAdjoint(), z0).value
    assert torch.equal(gradients(more, x, f.weight, z0), gradients(exact, x, f.weight, z0))
