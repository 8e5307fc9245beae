"""Approximate gradients of a fixed cost against plain loops, dense sums, and counts: phantom and truncated ones."""

import itertools

import pytest
import torch

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
)
from tests.helpers.equilibrium import (
    BPTT,
    TIGHT,
    TanhMap,
    dense_implicit_gradients,
    gradients,
    inputs,
    project,
    relative_error,
    solve,
    with_every_solver,
)

kinds = pytest.mark.parametrize("kind", ["unrolled", "neumann"])


@kinds
def test_phantom_tends_to_the_implicit_gradient_as_its_steps_grow(kind):
    f, x = TanhMap(), inputs()
    value = solve(f, x, AndersonSolver(max_steps=100, rtol=1e-13), TIGHT).value
    exact = dense_implicit_gradients(f, value, x, f.weight)
    bptt = gradients(solve(f, x, PicardSolver(max_steps=150), BPTT).value, x, f.weight)
    errors = []
    for num_steps in (1, 4, 16, 64):
        adjoint = PhantomAdjoint(num_steps=num_steps, beta=0.8, kind=kind)
        ours = gradients(solve(f, x, AndersonSolver(max_steps=100, rtol=1e-13), adjoint).value, x, f.weight)
        errors.append((relative_error(ours, exact), relative_error(ours, bptt)))
    for k in range(2):
        assert errors[0][k] > 0.2
        assert all(b[k] < 0.9 * a[k] for a, b in itertools.pairwise(errors))
        assert errors[-1][k] <= 1e-6


@pytest.mark.parametrize("num_steps", [1, 5])
def test_unrolled_phantom_gradient_is_bptt_of_relaxation_from_the_result(num_steps):
    f, x = TanhMap(norm=1.3), inputs()
    value = solve(f, x, PicardSolver(max_steps=3), PhantomAdjoint(num_steps=num_steps, beta=0.6)).value
    h = value.detach()
    for _ in range(num_steps):
        h = 0.4 * h + 0.6 * f(h, x)
    assert relative_error(gradients(value, x, f.weight), gradients(h, x, f.weight)) <= 1e-14


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_neumann_phantom_gradient_is_the_dense_sum(num_steps):
    f, x = TanhMap(norm=1.3), inputs(batch=1)
    solution = solve(f, x, PicardSolver(max_steps=3), PhantomAdjoint(num_steps=num_steps, beta=0.6, kind="neumann"))
    z = solution.value.detach()
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v[None], x.detach())[0], z[0])
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[0]  # as in `gradients`
    step = 0.4 * torch.eye(6, dtype=torch.float64) + 0.6 * jacobian.T
    w = 0.6 * sum(torch.linalg.matrix_power(step, t) @ g for t in range(num_steps))
    expected = torch.cat([t.flatten() for t in torch.autograd.grad(f(z, x), (x, f.weight), w[None])])
    f.calls = f.backward_calls = 0
    assert relative_error(gradients(solution.value, x, f.weight), expected) <= 1e-14
    assert solution.stats.backward_num_products == num_steps - 1 == f.backward_calls - 1
    assert solution.stats.backward_nfe == 0 == f.calls


@kinds
def test_one_step_with_beta_1_is_the_jacobian_free_gradient(kind):
    f, x = TanhMap(), inputs()
    value = solve(f, x, PicardSolver(max_steps=9), PhantomAdjoint(num_steps=1, beta=1.0, kind=kind)).value
    jacobian_free = f(value.detach(), x)
    assert relative_error(gradients(value, x, f.weight), gradients(jacobian_free, x, f.weight)) <= 1e-15


def test_evaluations_of_the_phantom_are_counted():
    for kind, more in (("unrolled", 4), ("neumann", 1)):
        f, x = TanhMap(), inputs()
        solution = solve(f, x, PicardSolver(max_steps=9), PhantomAdjoint(num_steps=4, kind=kind))
        assert f.calls == 9 + more == solution.stats.forward_nfe
        project(solution.value).backward()
        assert f.calls == 9 + more
        assert f.backward_calls == 4


# The last evaluations alone


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


@pytest.mark.parametrize(
    ("name", "num_recorded", "checkpoint"),
    [("picard", 1, False), ("picard", 3, True), ("relaxed", 3, False), ("momentum", 3, True), ("momentum", 7, False)],
)
def test_truncated_gradient_is_that_of_a_loop_that_detaches(name, num_recorded, checkpoint):
    solver, step = LOOPS[name]
    f, x = TanhMap(norm=1.3), inputs()
    adjoint = BackpropAdjoint(num_evaluations=num_recorded, checkpoint=checkpoint)
    value = solve(f, x, solver, adjoint).value
    expected = truncated_loop(step(f, x), torch.zeros_like(x), 7, num_recorded)
    assert relative_error(value, expected) <= 1e-15
    ours, reference = gradients(value, x, f.weight), gradients(expected, x, f.weight)
    assert relative_error(ours, reference) <= 1e-14
    full = gradients(solve(f, x, solver, BPTT).value, x, f.weight)
    assert (relative_error(ours, full) <= 1e-14) == (num_recorded == 7)


@with_every_solver
def test_only_the_last_evaluations_are_differentiated(make):
    f, x = TanhMap(), inputs()
    z0 = torch.zeros_like(x).requires_grad_()
    solver = make(max_steps=6)
    solution = solve(f, x, solver, BackpropAdjoint(num_evaluations=2), z0)
    assert torch.equal(solution.value, solve(TanhMap(), x, solver, BPTT).value)
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
