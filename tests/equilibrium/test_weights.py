"""Weights computed from parameters: once a solve, the same in both passes, differentiated as in a plain loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

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
    normalize_weights,
)
from tests.helpers.equilibrium import attention_layer, gradients, relative_error, sequence

TIGHT = ImplicitAdjoint(solver=AndersonSolver(max_steps=50, rtol=1e-12))
PAIRS = {
    "reversible": (ReversibleSolver(beta=0.8, max_steps=30), ReversibleAdjoint(mismatch="raise")),
    "momentum": (MomentumSolver(max_steps=40), ReversibleAdjoint(mismatch="raise", forward_with_grad=True)),
    "stored": (PicardSolver(max_steps=40), BackpropAdjoint()),
    "checkpointed": (PicardSolver(max_steps=40), BackpropAdjoint(checkpoint=True)),
    "implicit": (AndersonSolver(max_steps=60, rtol=1e-12), TIGHT),
    "broyden": (BroydenSolver(max_steps=60, rtol=1e-12), TIGHT),
    "phantom": (PicardSolver(max_steps=40), PhantomAdjoint(num_steps=40, beta=1.0)),
}


class Half(nn.Module):
    """Half the weight; counts how often it is computed."""

    calls = 0

    def forward(self, weight):
        Half.calls += 1
        return 0.5 * weight


class Map(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, z, x):
        return torch.tanh(0.8 * self.linear(z) + x)


def inputs():
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize(("solver", "adjoint"), PAIRS.values(), ids=PAIRS)
def test_spectral_normalization_in_training_is_one_map_a_solve(solver, adjoint):
    """Its estimate moves with every access; a loop that reads the weight once is the reference."""
    f, x = Map(), inputs()
    parametrizations.spectral_norm(f.linear)
    with torch.no_grad():
        f.linear.parametrizations.weight.original.add_(0.3 * torch.randn(6, 6, dtype=torch.float64))
    reference = copy.deepcopy(f)
    weight = reference.linear.weight  # one power iteration
    z = torch.zeros_like(x)
    for _ in range(200):
        z = torch.tanh(0.8 * nn.functional.linear(z, weight, reference.linear.bias) + x)
    value = EquilibriumLayer(f, solver=solver, adjoint=adjoint)(x).value
    assert relative_error(value, z) <= 1e-9
    ours = gradients(value, x, *f.parameters())
    assert relative_error(ours, gradients(z, x, *reference.parameters())) <= 1e-7
    for own, other in zip(f.buffers(), reference.buffers(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize(("solver", "adjoint"), PAIRS.values(), ids=PAIRS)
def test_a_weight_is_computed_once_a_solve(solver, adjoint, cached):
    f, x = Map(), inputs()
    parametrize.register_parametrization(f.linear, "weight", Half())
    layer = EquilibriumLayer(f, solver=solver, adjoint=adjoint)
    for _ in range(2):
        Half.calls = 0
        with parametrize.cached() if cached else torch.enable_grad():
            layer(x).value.sum().backward()
        assert Half.calls == 1
    before = f.linear.weight
    with torch.no_grad():
        f.linear.parametrizations.weight.original.mul_(2)
        assert torch.equal(f.linear.weight, 2 * before)  # afterwards the module computes as ever
        assert Half.calls == 3


def test_an_equilibrium_inside_f_leaves_the_outer_weights():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = EquilibriumLayer(Map(), solver=MomentumSolver(max_steps=5), adjoint=ReversibleAdjoint())

        def forward(self, z, x):
            first = self.inner(z).value
            return torch.tanh(0.5 * first + 0.2 * self.inner.f.linear(z) + x)

    f, x = Outer(), inputs()
    parametrize.register_parametrization(f.inner.f.linear, "weight", Half())
    results = []
    for adjoint in (ReversibleAdjoint(mismatch="raise"), BackpropAdjoint()):
        f.inner.adjoint = adjoint
        Half.calls = 0
        value = EquilibriumLayer(f, solver=MomentumSolver(max_steps=6), adjoint=adjoint)(x).value
        results.append(gradients(value, x, *f.parameters()))
        assert Half.calls == 1
    assert relative_error(*results) <= 1e-9


def test_normalized_weights_have_the_norm_that_was_asked_for():
    block = attention_layer(MomentumSolver(), ReversibleAdjoint()).f
    lengths = block.up.weight.norm(dim=1)
    assert normalize_weights(block, "weight") is block
    assert torch.equal(block.up.parametrizations.weight.original0.flatten(), lengths)
    torch.testing.assert_close(block.up.weight.norm(dim=1), lengths)
    block = normalize_weights(nn.Sequential(nn.Linear(5, 7), nn.Conv2d(3, 4, 3)), norm=0.7)
    for _ in range(200):  # one power iteration each
        kernel = block[1].weight
        matrix = block[0].weight
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(0.7, rel=1e-4)
    assert torch.linalg.matrix_norm(kernel.flatten(1), 2).item() == pytest.approx(0.7, rel=1e-4)


def test_a_normalized_block_trains_with_proof():
    layer, x = attention_layer(MomentumSolver(max_steps=6), ReversibleAdjoint(mismatch="raise")), sequence()
    normalize_weights(layer.f, norm=0.5)
    layer.train()
    solution = layer(x)
    solution.value.square().mean().backward()
    assert solution.stats.reconstruction_mismatch == 0
    assert all(p.grad is not None and torch.count_nonzero(p.grad) for p in layer.parameters())
    loaded = normalize_weights(attention_layer(MomentumSolver(), ReversibleAdjoint()).f, norm=0.5)
    loaded.load_state_dict(layer.f.state_dict())


def zero_weight():
    f = Map()
    nn.init.zeros_(f.linear.weight)
    return f


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (Map, {"kind": "batch"}, "kind must be one of 'weight', 'spectral', got 'batch'"),
        (Map, {"norm": 0.0}, "norm must be positive and belongs to kind='spectral', got norm=0.0"),
        (Map, {"kind": "weight", "norm": 0.5}, "belongs to kind='spectral', got norm=0.5, kind='weight'"),
        (nn.Tanh, {}, "nothing to normalize: Tanh has no linear map and no convolution"),
        (lambda: normalize_weights(Map()), {}, "the weight of 'linear' is parametrized already"),
        (zero_weight, {"kind": "weight"}, "the weight of 'linear' has outputs that are 0"),
    ],
)
def test_what_cannot_be_normalized_is_an_error(make, arguments, match):
    with pytest.raises(ValueError, match=match):
        normalize_weights(make(), **arguments)
