"""What f may hold: weights computed from parameters, other equilibria, and more."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from revdeq_lightning.equilibrium import (
    EquilibriumLayer,
    MomentumSolver,
    PhantomAdjoint,
    ReversibleAdjoint,
    normalize_weights,
)
from tests.helpers.equilibrium import (
    BPTT,
    EVERY_ADJOINT,
    REVERSIBLE,
    SOLVERS,
    AttentionBlock,
    assert_equal_gradients,
    attention_layer,
    backward,
    gradients,
    inputs,
    matches_bptt,
    relative_error,
    sequence,
    with_every_adjoint,
)


class Of(nn.Module):
    """f(z, x) = module(z + x)."""

    def __init__(self, *modules):
        super().__init__()
        self.module = nn.Sequential(*modules)

    def forward(self, z, x):
        return self.module(z + x)


def test_transformer_layer_of_torch_in_eval_mode():
    """It has a fast path that it takes only without gradients: `forward_with_grad` keeps it on the same one."""

    def run(adjoint):
        torch.manual_seed(0)
        f = Of(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
        return backward(EquilibriumLayer(f, solver=SOLVERS["reversible"], adjoint=adjoint).eval(), sequence())

    assert_equal_gradients(run(ReversibleAdjoint(mismatch="raise", forward_with_grad=True)), run(BPTT))


@matches_bptt()
def test_tied_parameters(solver, adjoint):
    torch.manual_seed(0)
    f = Of(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    f.module[2].weight = f.module[0].weight
    layer = EquilibriumLayer(f, solver=solver, adjoint=adjoint)
    assert len(list(layer.parameters())) == 3
    return backward(layer, sequence())


class Nested(nn.Module):
    """f that solves an equilibrium of its own."""

    def __init__(self, solver, adjoint):
        super().__init__()
        self.inner = EquilibriumLayer(AttentionBlock(dim=16, num_heads=2, dropout=0.3), solver=solver, adjoint=adjoint)
        self.norm = nn.LayerNorm(16)

    def forward(self, z, x):
        return self.norm(x + self.inner(z).value)


@matches_bptt()
def test_equilibrium_inside_f(solver, adjoint):
    torch.manual_seed(0)
    return backward(EquilibriumLayer(Nested(solver, adjoint), solver=solver, adjoint=adjoint), sequence())


class Contracting(nn.Module):
    """With an inner equilibrium, an outer f whose fixed point every adjoint differentiates."""

    def __init__(self, solver=None, inner=None):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.inner = inner and EquilibriumLayer(Contracting(), solver=solver, adjoint=inner)

    def forward(self, z, x):
        z = self.inner(z).value if self.inner else z
        return 0.1 * torch.tanh(self.linear(z)) + x


NESTED = EVERY_ADJOINT | {"stored": ReversibleAdjoint(mismatch="raise", stored_evaluations=2)}


@pytest.mark.parametrize("outer", NESTED)
def test_equilibria_of_any_two_adjoints_nest(outer):
    """At the fixed points all gradients are that of BPTT; frozen parameters take other ways, of either level."""

    def run(outer, inner, frozen):
        torch.manual_seed(0)
        solver = MomentumSolver(momentum=1 / 32, max_steps=8)
        layer = EquilibriumLayer(Contracting(solver, inner), solver=solver, adjoint=outer).requires_grad_(not frozen)
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        return [gradient for gradient in backward(layer, x) if gradient is not None]

    references = [run(BPTT, BPTT, frozen) for frozen in (False, True)]
    for i, inner in enumerate(NESTED.values()):
        frozen = (i + list(NESTED).index(outer)) % 2 == 1
        assert_equal_gradients(run(NESTED[outer], inner, frozen), references[frozen], 1e-4)  # 8 steps leave 1e-6


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_as_f():
    """The gradients of the same f as a Python module."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, z, x):
            return 0.25 * torch.tanh(self.linear(z)) + x

    for adjoint in NESTED.values():
        scripted, plain = (
            backward(
                EquilibriumLayer(f, solver=MomentumSolver(max_steps=8), adjoint=adjoint),
                torch.ones(3, 4, dtype=torch.float64, requires_grad=True),
            )
            for f in (torch.jit.script(Small()), Small())
        )
        assert_equal_gradients(scripted, plain, 1e-12)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_energy_whose_gradient_f_takes(frozen):
    """Its own leaf, made in every evaluation, has no gradient to lose."""

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, z, x):
            with torch.enable_grad():
                own = z if z.requires_grad else z.detach().requires_grad_()
                energy = torch.cosh(self.linear(own)).log().sum()
                (gradient,) = torch.autograd.grad(energy, own, create_graph=True)
            return x - 0.3 * gradient

    def run(adjoint):
        torch.manual_seed(0)
        layer = EquilibriumLayer(Energy(), solver=MomentumSolver(max_steps=5), adjoint=adjoint)
        layer.requires_grad_(not frozen)
        x = torch.randn(3, 4, dtype=torch.float64).requires_grad_(not frozen)
        return [layer(x).value.detach()] if frozen else backward(layer, x)

    assert_equal_gradients(run(REVERSIBLE), run(BPTT), 1e-10)


# Weights computed from parameters: once a solve, the same in both passes

TO_THE_END = MomentumSolver(max_steps=40)
ACCURATE = EVERY_ADJOINT | {kind: PhantomAdjoint(num_steps=40, beta=1.0, kind=kind) for kind in ("unrolled", "neumann")}

with_accurate = pytest.mark.parametrize("adjoint", ACCURATE.values(), ids=ACCURATE)


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


@with_accurate
def test_spectral_normalization_in_training_is_one_map_a_solve(adjoint):
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
    value = EquilibriumLayer(f, solver=TO_THE_END, adjoint=adjoint)(x).value
    assert relative_error(value, z) <= 1e-9
    ours = gradients(value, x, *f.parameters())
    assert relative_error(ours, gradients(z, x, *reference.parameters())) <= 1e-7
    for own, other in zip(f.buffers(), reference.buffers(), strict=True):
        assert torch.equal(own, other)


@with_every_adjoint
def test_a_weight_is_computed_once_a_solve(adjoint):
    f, x = Map(), inputs()
    parametrize.register_parametrization(f.linear, "weight", Half())
    layer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=6), adjoint=adjoint)
    for cached in (False, True):
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
    for adjoint in (REVERSIBLE, BPTT):
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
    layer, x = attention_layer(MomentumSolver(max_steps=6), REVERSIBLE), sequence()
    normalize_weights(layer.f, norm=0.5)
    assert all(gradient is not None and gradient.any() for gradient in backward(layer, x))
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
