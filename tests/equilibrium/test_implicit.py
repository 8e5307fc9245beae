"""ImplicitAdjoint against a dense solve, closed forms, finite differences and counts."""

import pytest
import torch
from torch import nn

from benchmarks.measure import peak_tensor_bytes
from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    DivergenceError,
    ImplicitAdjoint,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
)
from tests.helpers.equilibrium import (
    TIGHT,
    AttentionBlock,
    Damped,
    TanhMap,
    dense_implicit_gradients,
    gradients,
    inputs,
    project,
    relative_error,
    solve,
    with_every_solver,
)


@pytest.mark.parametrize("mixing", [0.0, 0.1])
@with_every_solver
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


def test_implicit_gradient_matches_bptt_of_many_steps_and_passes_gradcheck():
    f, x = TanhMap(), inputs()
    bptt = gradients(solve(f, x, PicardSolver(max_steps=150), BackpropAdjoint()).value, x, f.weight)
    solver = AndersonSolver(max_steps=100, rtol=1e-12)
    assert relative_error(gradients(solve(f, x, solver, TIGHT).value, x, f.weight), bptt) <= 1e-9

    def value(weight, x):
        return solve(lambda z, x: torch.tanh(z @ weight.T + x), x, solver, TIGHT).value

    assert torch.autograd.gradcheck(value, (f.weight, x), eps=1e-6, atol=1e-6)


def test_implicit_gradient_of_an_affine_map_that_expands():
    """Closed form with eigenvalues up to 3: plain iteration would diverge in both passes."""
    x = inputs(4, 5)
    orthogonal = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    weight = nn.Parameter(orthogonal @ torch.diag(torch.linspace(-3, 3, 5, dtype=torch.float64)) @ orthogonal.T)
    f = lambda z, x: z @ weight.T + x  # noqa: E731
    closed_form = x @ torch.linalg.inv(torch.eye(5, dtype=torch.float64) - weight).T
    value = solve(f, x, BroydenSolver(max_steps=60, rtol=1e-10, max_halvings=0), TIGHT).value
    assert relative_error(value, closed_form) <= 1e-8
    assert relative_error(gradients(value, x, weight), gradients(closed_form, x, weight)) <= 1e-8
    picard = ImplicitAdjoint(solver=PicardSolver(max_steps=2000, rtol=1e-8))
    value = solve(f, x, BroydenSolver(max_steps=60, rtol=1e-10, max_halvings=0), picard).value
    with pytest.raises(
        DivergenceError, match=r"linear system of ImplicitAdjoint.*expands.*BroydenSolver.*PicardSolver"
    ):
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


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), PhantomAdjoint(), PhantomAdjoint(kind="neumann")])
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


@pytest.mark.parametrize("scale", [1e-20, 1e12])
def test_linear_solve_knows_no_scale_of_the_loss(scale):
    """Gradients of 1e-20 are below the residual's epsilon and the exact state's resolution."""
    f, x = TanhMap(), inputs()
    for backward in (AndersonSolver, ReversibleSolver):
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


def peak_bytes(solver, adjoint):
    torch.manual_seed(0)
    f = Damped(AttentionBlock(16, 4))
    x = torch.randn(1, 16, 16, requires_grad=True)

    def run():
        value = solve(f, x, solver, adjoint).value
        torch.autograd.grad(value.sum(), [x, *f.parameters()])

    return peak_tensor_bytes(run)


def test_memory_does_not_depend_on_the_steps_of_either_solve():
    peak_bytes(RelaxedSolver(max_steps=1), PhantomAdjoint(num_steps=1))  # what PyTorch makes once
    for adjoint in (PhantomAdjoint(num_steps=2), PhantomAdjoint(kind="neumann")):
        few, many = (peak_bytes(RelaxedSolver(max_steps=n), adjoint) for n in (4, 16))
        assert many - few <= 16 * (16 - 4)
    peaks = [
        peak_bytes(solver(max_steps=n), ImplicitAdjoint(solver=backward(max_steps=n, rtol=1e-12), unconverged="ignore"))
        for solver, backward in ((RelaxedSolver, RelaxedSolver), (AndersonSolver, AndersonSolver))
        for n in (8, 24)
    ]
    for few, many in (peaks[:2], peaks[2:]):  # Anderson's window is full after 6 steps
        assert many - few <= 16 * (24 - 8)  # a few numbers a step, where a state has 1024 bytes
    bptt = peak_bytes(RelaxedSolver(max_steps=8), BackpropAdjoint())
    assert peaks[0] < bptt / 3
    # The twin: every unrolled step is stored.
    unrolled = [peak_bytes(RelaxedSolver(max_steps=4), PhantomAdjoint(num_steps=n)) for n in (4, 8, 12)]
    assert unrolled[2] - unrolled[1] == unrolled[1] - unrolled[0] > 0
