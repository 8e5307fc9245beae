"""The residual at every evaluation, against the states that f itself writes down."""

import math

import pytest
import torch

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    recorded_residuals,
)
from tests.helpers.equilibrium import Spy, TanhMap, attention_layer, inputs, sequence


class Noting(TanhMap):
    """Writes down `norm(f - z) / norm(f)` of each sample at every call of the forward pass."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.noted = []

    def forward(self, z, x):
        value = super().forward(z, x)
        with torch.no_grad():
            self.noted.append([((v - u).norm() / v.norm()).item() for v, u in zip(value, z, strict=True)])
        return value


def recorded(solver, adjoint):
    layer = EquilibriumLayer(Noting(), solver=solver, adjoint=adjoint)
    with recorded_residuals():
        # Samples in which tanh is more and less saturated converge more and less fast.
        solution = layer(inputs() * torch.tensor([[0.3], [1.0], [4.0]]))
    return layer.f.noted, solution.stats


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (MomentumSolver(max_steps=5), ReversibleAdjoint()),
        (ReversibleSolver(max_steps=3), ReversibleAdjoint(forward_with_grad=True)),
        (ReversibleSolver(max_steps=3), BackpropAdjoint(checkpoint=True)),
        (AndersonSolver(max_steps=5), ImplicitAdjoint()),
        (BroydenSolver(max_steps=5), PhantomAdjoint()),
    ],
)
def test_it_is_that_of_every_state_at_which_f_was_evaluated(solver, adjoint):
    noted, stats = recorded(solver, adjoint)
    evaluations = solver.max_steps * solver.evaluations_per_step
    assert stats.residual_curve.shape == (evaluations, 3)
    # 1e-5 is added to the norm of f, which is about 1.
    torch.testing.assert_close(stats.residual_curve, torch.tensor(noted[:evaluations]).double(), rtol=1e-4, atol=0)
    assert torch.equal(stats.residual_curve[-1], stats.relative_residual)


@pytest.mark.parametrize("max_steps", [4, 40])
def test_of_a_sample_that_stopped_there_is_none(max_steps):
    noted, stats = recorded(PicardSolver(max_steps=max_steps, rtol=0.02), BackpropAdjoint())
    curve = stats.residual_curve
    assert len(curve) == stats.forward_nfe == len(noted)
    steps = stats.num_steps.tolist()
    assert (max(steps) == max_steps) == (max_steps == 4)
    assert min(steps) < max(steps)
    for sample, made in enumerate(steps):
        # One evaluation more than steps: that at the state where it stops.
        expected = [row[sample] for row in noted[: made + 1]]
        assert curve[: made + 1, sample].tolist() == pytest.approx(expected, rel=1e-4)
        assert all(math.isnan(value) for value in curve[made + 1 :, sample].tolist())


def test_without_being_asked_for_there_is_none_and_asking_changes_nothing():
    layer, x = (
        attention_layer(MomentumSolver(max_steps=6), ReversibleAdjoint(mismatch="raise"), dropout=0.2),
        sequence(),
    )

    def run():
        torch.manual_seed(3)
        with Spy() as spy:
            solution = layer(x)
        solution.value.sum().backward()
        return solution, spy.count, torch.rand(())

    plain, waits, draw = run()
    with recorded_residuals():
        asked, waits_when_asked, draw_when_asked = run()
    assert plain.stats.residual_curve is None
    assert len(asked.stats.residual_curve) == asked.stats.forward_nfe == plain.stats.forward_nfe
    assert torch.equal(plain.value, asked.value)
    assert draw == draw_when_asked
    assert waits == waits_when_asked
    assert run()[0].stats.residual_curve is None
