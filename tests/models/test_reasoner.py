"""Reasoners: gradients, sizes, evaluations."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from revdeq_lightning import BackpropAdjoint, MomentumSolver, ReversibleAdjoint, ReversibleSolver
from revdeq_lightning.models import ExplicitReasoner, Reasoner, ReasonerConfig

STRING = ReasonerConfig(num_symbols=2, num_answers=2, shape=[8], channels=8)
GRID = ReasonerConfig(num_symbols=4, num_answers=2, shape=[5, 7], channels=8, num_layers=2)
ATTENTION = ReasonerConfig(num_symbols=5, num_answers=5, shape=[4, 4], channels=8, block="attention", num_heads=2)
CONFIGS = pytest.mark.parametrize("config", [STRING, GRID, ATTENTION], ids=["string", "grid", "attention"])


def reasoner(config, solver=None, adjoint=None, **settings):
    torch.manual_seed(0)
    model = Reasoner(config, solver or MomentumSolver(max_steps=6), adjoint or ReversibleAdjoint(), **settings)
    for parameter in model.equilibrium.f.parameters():  # convolutions that start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def puzzles(config, count=3, shape=None):
    generator = torch.Generator().manual_seed(1)
    size = (count, *(shape or config.shape))
    return tuple(torch.randint(n, size, generator=generator) for n in (config.num_symbols, config.num_answers))


@CONFIGS
@pytest.mark.parametrize("solver", [MomentumSolver(max_steps=6), ReversibleSolver(beta=0.8, max_steps=3)])
def test_gradients_are_those_of_backpropagation(config, solver):
    inputs, targets = puzzles(config)
    gradients = []
    for adjoint in (ReversibleAdjoint(), BackpropAdjoint()):
        model = reasoner(config, solver, adjoint)
        cross_entropy(model(inputs).logits, targets).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@CONFIGS
def test_every_cell_sees_its_neighbors_on_both_sides(config):
    model = reasoner(config).eval()
    inputs, _ = puzzles(config, count=1)
    for cell in (0, -1):
        other = inputs.clone()
        other.view(-1)[cell] = (other.view(-1)[cell] + 1) % config.num_symbols
        with torch.no_grad():
            change = (model(inputs).logits - model(other).logits).abs().amax(1).flatten()
        assert change[1 if cell == 0 else -2] > 0


def test_larger_puzzles_get_more_evaluations():
    model = reasoner(STRING).eval()
    with torch.no_grad():
        assert model(puzzles(STRING)[0]).evaluations.tolist() == [6, 6, 6]
        assert model(puzzles(STRING, shape=[20])[0]).evaluations.tolist() == [15, 15, 15]
        assert model(puzzles(STRING, shape=[4])[0]).evaluations.tolist() == [6, 6, 6]
        assert model(puzzles(STRING)[0], max_steps=11).evaluations.tolist() == [11, 11, 11]
    assert model.train()(puzzles(STRING, shape=[20])[0]).evaluations.tolist() == [6, 6, 6]


@pytest.mark.parametrize("solver", [MomentumSolver(max_steps=6), MomentumSolver(max_steps=6, momentum=0.5)])
def test_answers_along_a_solve_are_those_of_shorter_solves(solver):
    model = reasoner(GRID, solver).eval()
    inputs, _ = puzzles(GRID)
    along = model.answers_along(inputs, [1, 4], max_steps=9)
    assert len(along) == 3
    for answers, steps in zip(along, (1, 4, 9), strict=True):
        assert torch.equal(answers, model(inputs, max_steps=steps).logits.argmax(1))
    model.equilibrium.solver = MomentumSolver(max_steps=40, rtol=0.5)
    assert int(model(inputs).solution.stats.forward_nfe) < 39
    _, late, last = model.answers_along(inputs, [1, 39])
    assert torch.equal(late, last)  # a solve that stopped keeps its last answers


def test_a_solve_starts_where_it_is_told():
    model = reasoner(GRID, MomentumSolver(max_steps=1)).eval()
    inputs, _ = puzzles(GRID)
    z0 = model.random_state(inputs, torch.Generator().manual_seed(0))
    expected = model.readout(model.equilibrium.f(z0, model.embed(inputs)))
    assert torch.allclose(model(inputs, z0=z0).logits, expected, atol=1e-5)


def test_parts_of_a_solve_have_results_and_an_explicit_stack_has_layers_of_their_own():
    solution = reasoner(GRID, num_losses=3)(puzzles(GRID)[0]).solution
    assert [part.stats.forward_nfe for part in (*solution.earlier, solution)] == [2, 2, 2]
    layers = ExplicitReasoner(dataclasses.replace(GRID, num_layers=5)).block.layers
    assert len({id(layer.conv1.weight) for layer in layers}) == 5


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (torch.zeros(2, 5, 5, dtype=torch.long), r"learned positions for puzzles of shape \(4, 4\), got \(5, 5\)"),
        (torch.full((2, 4, 4), 5), "symbols must be from 0 to 4, got 5"),
        (torch.zeros(2, 16, dtype=torch.long), "integers with 3 dimensions"),
        (torch.zeros(2, 4, 4), "integers with 3 dimensions, batch first, got torch.float32"),
    ],
)
def test_wrong_puzzles_are_refused(inputs, says):
    with pytest.raises(ValueError, match=says):
        reasoner(ATTENTION)(inputs)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shape": [2, 2, 2]}, "shape must be"),
        ({"block": "graph"}, "block must be one of convolution, attention or an import path, got 'graph'"),
        ({"num_heads": 2}, "num_heads belongs to block 'attention'"),
        ({"block": "my.Block", "num_layers": 2}, "num_layers belongs to block 'convolution' or 'attention'"),
        ({"growth": -1.0}, "growth must be in"),
        ({"block": "attention"}, "num_heads must be at least 1, got 0"),
        ({"padding": "reflect"}, "padding must be one of"),
        ({"block": "attention", "num_heads": 2, "growth": 1.5}, "growth has no effect without a block for puzzles"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        ReasonerConfig(**{"num_symbols": 2, "num_answers": 2, "shape": [4]} | settings)


def test_circular_padding_knows_no_border():
    config = dataclasses.replace(GRID, padding="circular")
    inputs, _ = puzzles(config)
    model, bounded = reasoner(config).eval(), reasoner(GRID).eval()
    with torch.no_grad():
        rolled = model(inputs.roll((2, 3), (1, 2))).logits
        assert torch.allclose(rolled, model(inputs).logits.roll((2, 3), (2, 3)), atol=1e-4)
        rolled = bounded(inputs.roll((2, 3), (1, 2))).logits
        assert not torch.allclose(rolled, bounded(inputs).logits.roll((2, 3), (2, 3)), atol=1e-2)
