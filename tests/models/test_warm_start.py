"""Solves that start where the last one ended: the same results with fewer evaluations."""

import pytest
import torch

from revdeq_lightning.equilibrium import AndersonSolver, BackpropAdjoint, EquilibriumLayer, MomentumSolver
from revdeq_lightning.models import generate
from tests.helpers.equilibrium import TIGHT, TanhMap, gradients, inputs, relative_error, solve
from tests.helpers.modules import make_batch, make_model


def contracting_model(solver):
    model = make_model("modern", solver=solver, adjoint=BackpropAdjoint())
    with torch.no_grad():
        model.equilibrium.f.norm.weight.mul_(0.3)
    return model


def generated(model, **settings):
    """Greedy text, longer than the context, and the evaluations that it took."""
    evaluations = []
    handle = model.equilibrium.register_forward_hook(
        lambda layer, args, solution: evaluations.append(solution.stats.forward_nfe)
    )
    text = generate(model, make_batch()[0][:, :5], 14, temperature=0, use_cache=False, **settings)
    handle.remove()
    return text, evaluations


def test_generation_from_the_last_states_is_the_same_text_with_fewer_evaluations():
    model = contracting_model(AndersonSolver(max_steps=60, rtol=1e-5))
    cold, cold_evaluations = generated(model)
    warm, warm_evaluations = generated(model, warm_start=True)
    assert torch.equal(warm, cold)
    assert warm_evaluations[0] == cold_evaluations[0]
    assert sum(warm_evaluations[1:]) < 0.9 * sum(cold_evaluations[1:])
    assert not model.equilibrium._forward_pre_hooks
    assert not model.equilibrium._forward_hooks


def test_each_solve_starts_from_the_states_of_its_own_tokens():
    model = contracting_model(AndersonSolver(max_steps=60, rtol=1e-5))
    starts, results = [], []
    solve_parts = model.equilibrium.solve

    def watched(f, z0, x, **settings):
        starts.append(z0)
        results.append(solve_parts(f, z0, x, **settings))
        return results[-1]

    model.equilibrium.solve = watched
    generated(model, warm_start=True)
    lengths = [z.shape[1] for z in starts]
    assert lengths == [5, 6, 7, 8, 9, 10, 11, 12, 6, 7, 8, 9, 10, 11]  # the context of 12 was full
    assert not starts[0].any()
    for start, before in zip(starts[1:], results, strict=False):
        old = start.shape[1] - 1
        assert torch.equal(start[:, :old], before.value[:, -old:])
        assert torch.equal(start[:, old], before.value[:, -1])


@pytest.mark.parametrize(("kind", "use_cache"), [("modern", False), ("modern", True), ("explicit", False)])
def test_a_warm_start_that_would_change_the_text_is_an_error(kind, use_cache):
    model = make_model(kind, solver=MomentumSolver(max_steps=3))
    with pytest.raises(ValueError, match="warm_start=True needs a solver with a tolerance and use_cache=False"):
        generate(model, make_batch()[0], 2, use_cache=use_cache, warm_start=True)


def test_a_batch_seen_again_starts_from_its_last_state():
    """The example: keep the detached state of a batch, give it as z0 when the batch comes again."""
    f, x = TanhMap(), inputs()
    layer = EquilibriumLayer(f, solver=AndersonSolver(max_steps=60, rtol=1e-9), adjoint=TIGHT)
    first = layer(x)
    with torch.no_grad():
        f.weight -= 1e-3  # a training step
    again = layer(x, first.value.detach())
    cold = solve(f, x, layer.solver, TIGHT)
    assert again.stats.converged.all()
    assert again.stats.forward_nfe < cold.stats.forward_nfe - 1
    assert relative_error(gradients(again.value, x, f.weight), gradients(cold.value, x, f.weight)) <= 1e-7
