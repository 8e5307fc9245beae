"""A solve in parts: against plain loops that restart, one solve, and integer counts; fixed-point correction on top."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    EquilibriumLayer,
    MomentumSolver,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
    solve_in_parts,
)
from revdeq_lightning.models import ClassifierConfig, TransformerConfig, TransformerLM, generate
from revdeq_lightning.models.build import SolverConfig, build_image_classifier, build_language_model
from tests.helpers.equilibrium import (
    BPTT,
    REVERSIBLE,
    TIGHT,
    TanhMap,
    gradients,
    inputs,
    relative_error,
    solve,
    with_every_solver,
)
from tests.helpers.modules import make_batch, make_model


def in_parts(f, x, solver, adjoint, num_parts):
    last = solve_in_parts(f, torch.zeros_like(x), x, solver=solver, adjoint=adjoint, num_parts=num_parts)
    return [*last.earlier, last]


def weighted(values):
    return sum((k + 1) * torch.sin(value) for k, value in enumerate(values))


@pytest.mark.parametrize("solver", [PicardSolver(max_steps=7), RelaxedSolver(max_steps=7, beta=0.6)])
def test_parts_of_a_solver_without_memory_are_the_iterates_of_one_solve(solver):
    f, x = TanhMap(norm=1.3), inputs()
    parts = in_parts(f, x, solver, BPTT, 3)
    assert [part.stats.forward_nfe for part in parts] == [2, 2, 3]
    beta = getattr(solver, "beta", 1.0)
    z, iterates = torch.zeros_like(x), []
    for _ in range(7):
        z = (1 - beta) * z + beta * f(z, x)
        iterates.append(z)
    assert parts[-1].earlier == tuple(parts[:-1])
    ours, expected = [part.value for part in parts], [iterates[1], iterates[3], iterates[6]]
    assert relative_error(weighted(ours), weighted(expected)) <= 1e-15
    assert relative_error(gradients(weighted(ours), x, f.weight), gradients(weighted(expected), x, f.weight)) <= 1e-14


@pytest.mark.parametrize("solver", [ReversibleSolver(beta=0.8, max_steps=5), MomentumSolver(max_steps=8)])
def test_the_reversible_gradient_of_losses_on_all_parts_matches_bptt(solver):
    results = []
    for adjoint in (REVERSIBLE, BPTT):
        f, x = TanhMap(norm=1.3), inputs()
        values = [part.value for part in in_parts(f, x, solver, adjoint, 4)]
        results.append(gradients(weighted(values), x, f.weight))
    assert relative_error(*results) <= 1e-9  # the exact state's resolution


def test_on_the_way_the_implicit_adjoint_is_jacobian_free_and_at_the_end_exact():
    f, x = TanhMap(), inputs()
    solver = AndersonSolver(max_steps=60, rtol=1e-13)
    first, last = in_parts(f, x, solver, TIGHT, 2)
    jacobian_free = f(first.value.detach(), x)
    for value, expected in ((first.value, jacobian_free), (last.value, solve(f, x, solver, TIGHT).value)):
        assert relative_error(gradients(value, x, f.weight), gradients(expected, x, f.weight)) <= 1e-9


@with_every_solver
def test_steps_are_shared_out(make):
    for num_parts, steps in ((1, [5]), (2, [2, 3]), (5, [1] * 5), (9, [1] * 5)):
        parts = in_parts(TanhMap(), inputs(), make(max_steps=5), BPTT, num_parts)
        assert [int(part.stats.num_steps.max()) for part in parts] == steps


def test_the_parts_of_a_layer_are_those_of_a_plain_loop():
    f, x = TanhMap(), inputs()
    layer = EquilibriumLayer(f, solver=PicardSolver(max_steps=6), adjoint=BPTT, num_parts=3)
    solution = layer(x)
    z = torch.zeros_like(x)
    for part in (*solution.earlier, solution):
        for _ in range(2):
            z = f(z, x)
        assert relative_error(part.value, z) <= 1e-15
    assert len(solution.earlier) == 2
    assert "num_parts=3" in repr(layer)
    assert EquilibriumLayer(f, solver=MomentumSolver())(x).earlier == ()


def corrected_model(num_losses, loss_decay=0.5):
    torch.manual_seed(0)
    reference = make_model("modern", solver=MomentumSolver(max_steps=6), adjoint=REVERSIBLE)
    model = TransformerLM(reference.config, MomentumSolver(max_steps=6), REVERSIBLE, num_losses, loss_decay)
    model.load_state_dict(reference.state_dict())
    return model


def test_the_corrected_loss_is_the_weighted_mean_of_the_parts():
    model, (tokens, targets) = corrected_model(3), make_batch()
    loss = model.loss(tokens, targets)
    x = model.embed(tokens)
    z, losses = torch.zeros_like(x), []
    for _ in range(3):
        z = solve(model.equilibrium.f, x, MomentumSolver(max_steps=2), BPTT, z).value
        logits = model.head(model.norm(z))
        losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100))
    expected = (0.25 * losses[0] + 0.5 * losses[1] + losses[2]) / 1.75
    torch.testing.assert_close(loss.loss, expected)
    ours, reference = (torch.autograd.grad(value, list(model.parameters())) for value in (loss.loss, expected))
    for a, b in zip(ours, reference, strict=True):
        assert relative_error(a, b) <= 1e-5
    assert [stats.forward_nfe for stats in (*loss.earlier_stats, loss.stats)] == [2, 2, 2]
    model.eval()
    evaluated = model.loss(tokens, targets)
    torch.testing.assert_close(evaluated.loss, losses[-1])  # the same solve, its last state alone
    assert evaluated.earlier_stats == ()


def test_a_corrected_model_generates_with_a_cache_what_it_generates_without():
    model = corrected_model(3)
    prompt = make_batch()[0][:, :4]
    texts = [generate(model, prompt, 6, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)


def language_model(**solver):
    sizes = {"vocab_size": 11, "context_length": 4, "d_model": 4, "num_heads": 2}
    return build_language_model(TransformerConfig(**sizes), SolverConfig(**solver))


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        ({"num_losses": 0}, "num_parts must be at least 1, got 0"),
        ({"num_losses": 9, "max_steps": 8}, "num_parts must be at most the solver's max_steps, 8, got 9"),
        ({"num_losses": 2, "loss_decay": 0.0}, r"loss_decay must be in \(0, 1\], got 0.0"),
        ({"loss_decay": 0.5}, "loss_decay=0.5 needs num_losses above 1"),
        ({"solver": "none", "num_losses": 2}, "solver='none' has no num_losses, got num_losses=2"),
    ],
)
def test_settings_of_the_correction_that_do_not_fit_are_errors(solver, match):
    with pytest.raises(ValueError, match=match):
        language_model(**solver)


def test_settings_reach_language_models_and_no_others():
    model = language_model(num_losses=4, loss_decay=0.9)
    assert (model.equilibrium.num_parts, model.loss_decay) == (4, 0.9)
    with pytest.raises(ValueError, match="num_losses=2 belongs to language models"):
        build_image_classifier(ClassifierConfig(num_classes=2), SolverConfig(num_losses=2))
