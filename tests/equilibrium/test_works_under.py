"""What people put around and inside an equilibrium: the gradient must be that of BPTT under the same conditions."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    ReversibleAdjoint,
)
from tests.helpers.equilibrium import (
    BPTT,
    REVERSIBLE,
    SOLVERS,
    AttentionBlock,
    assert_equal_gradients,
    assert_layer_matches_bptt,
    assert_matches_bptt,
    attention_layer,
    gradients_of,
    project,
    relative_error,
    sequence,
    with_solver,
)

# Precision


@with_solver
@pytest.mark.parametrize("inside", [True, False], ids=["backward_inside", "backward_outside"])
def test_bf16_autocast_is_as_close_to_float64_as_bptt(solver, inside):
    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        with torch.autocast("cpu", torch.bfloat16):
            # A bf16 x, as the layer before makes it under autocast.
            solution = layer(x.bfloat16())
            assert solution.value.dtype == torch.float32
            loss = project(solution.value)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        if adjoint is REVERSIBLE:
            assert solution.stats.reconstruction_mismatch == 0
        return torch.cat([g.flatten().double() for g in gradients_of(layer, x)])

    fixed = copy.copy(solver)
    layer, x = attention_layer(fixed, BPTT).double(), sequence().detach().double().requires_grad_()
    project(layer(x).value).backward()
    exact = torch.cat([g.flatten() for g in gradients_of(layer, x)])
    error, bptt_error = (relative_error(run(adjoint), exact) for adjoint in (REVERSIBLE, BPTT))
    assert 1e-4 < bptt_error < 0.3  # bf16 is at work
    assert error <= 1.5 * bptt_error


class Casts(TorchDispatchMode):
    """Shapes of what is cast to bfloat16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("_to_copy") and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stored", [0, 3])
def test_autocast_casts_a_weight_once_a_pass(stored):
    """And keeps no cast of a state: the gradient has the bits of an autocast that keeps nothing."""
    gradients = []
    for cache in (True, False):
        adjoint = ReversibleAdjoint(mismatch="raise", stored_evaluations=stored)
        layer, x = attention_layer(SOLVERS["momentum"], adjoint), sequence()
        layer.f.norm1 = nn.Identity()
        with Casts() as forward, torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = project(layer(x).value)
        with Casts() as backward:
            loss.backward()
        gradients.append(gradients_of(layer, x))
        for casts, calls in ((forward, 7), (backward, 7 - stored)):
            assert casts.shapes.count(layer.f.up.weight.shape) == (1 if cache else calls)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@with_solver
def test_weight_used_outside_the_solve_in_the_same_autocast_region(solver):
    """Autocast keeps a weight's cast until the region ends: one made without gradient must not serve later."""

    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        with torch.autocast("cpu", torch.bfloat16):
            before = layer.f.out(x)
            value = layer(x).value
            after = layer.f.out(value) + layer.f.qkv(value)[..., :16]
            project(before + after.float()).backward()
        return gradients_of(layer, x)

    assert_matches_bptt(run, 3e-2)  # BPTT adds up the gradients of one cast in bf16


@with_solver
def test_float64_gradient_matches_bptt(solver):
    assert_layer_matches_bptt(
        lambda adjoint: (attention_layer(solver, adjoint).double(), sequence(dtype=torch.float64)), 1e-8
    )


@pytest.mark.parametrize("solver", [SOLVERS["reversible"], SOLVERS["momentum"]], ids=["reversible", "momentum"])
def test_half_precision_parameters_match_bptt(solver):
    """Without autocast: everything in bf16, the sums of gradients in float32."""

    def run(adjoint):
        layer = attention_layer(solver, adjoint).bfloat16()
        x = sequence(dtype=torch.bfloat16)
        solution = layer(x)
        assert solution.value.dtype == torch.bfloat16
        project(solution.value.float()).backward()
        return gradients_of(layer, x)

    assert_matches_bptt(run, 3e-2)  # bf16 has 8 bits, and BPTT adds up in bf16


# Random numbers


@with_solver
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_dropout_has_one_mask_a_solve(solver, checkpointed):
    masks = []

    def run(adjoint):
        layer = attention_layer(solver, adjoint, dropout=0.4)
        masks.clear()
        layer.f.dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
        x = sequence()
        torch.manual_seed(5)
        for _ in range(2):
            if checkpointed:
                project(checkpoint(lambda x: layer(x).value, x, use_reentrant=False)).backward()
            else:
                project(layer(x).value).backward()
        return [*gradients_of(layer, x), torch.get_rng_state().float()]

    assert_matches_bptt(run)
    run(REVERSIBLE)
    first, half = masks[:2], len(masks) // 2
    assert len(masks) % 4 == 0
    assert half > 2 * 4
    for solve in (masks[:half], masks[half:]):
        assert all(torch.equal(mask, solve[i % 2]) for i, mask in enumerate(solve))  # two dropouts in the block
    assert 0.2 < first[0].float().mean() < 0.6
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], masks[half])


def test_random_state_after_a_solve_is_that_of_one_evaluation():
    layer, x = attention_layer(SOLVERS["reversible"], REVERSIBLE, dropout=0.4), sequence()
    torch.manual_seed(5)
    layer.f(torch.zeros_like(x), x)
    after_one = torch.get_rng_state()
    torch.manual_seed(5)
    value = layer(x).value
    assert torch.equal(torch.get_rng_state(), after_one)
    torch.rand(3)  # others draw between forward and backward
    between = torch.get_rng_state()
    project(value).backward()
    assert torch.equal(torch.get_rng_state(), between)


# Around the layer


@with_solver
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_torch_checkpoint_around_the_layer(solver, use_reentrant):
    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        project(checkpoint(lambda x: layer(x.cos()).value, x, use_reentrant=use_reentrant)).backward()
        return gradients_of(layer, x)

    assert_matches_bptt(run)


def test_layer_that_was_deepcopied_is_independent():
    layer, x = attention_layer(SOLVERS["momentum"], REVERSIBLE), sequence()
    project(layer(x).value).backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    twin = copy.deepcopy(layer)
    twin.zero_grad()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    project(twin(x).value).backward()
    assert_equal_gradients([p.grad for p in twin.parameters()], expected, 0.0)


@with_solver
def test_functional_call_gives_the_gradient_of_the_exchanged_tensors(solver):
    """The backward pass runs when the module has its own parameters back: it must use the exchanged ones."""

    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        factors = [torch.full_like(p, 0.1).requires_grad_() for p in layer.parameters()]
        exchanged = {name: p.detach() + f for (name, p), f in zip(layer.named_parameters(), factors, strict=True)}
        value = torch.func.functional_call(layer, exchanged, (x,)).value
        project(value).backward()
        assert all(p.grad is None for p in layer.parameters())
        return [f.grad for f in factors] + [x.grad]

    assert_matches_bptt(run)


@with_solver
@pytest.mark.parametrize("frozen", ["parameters", "some", "x", "all"])
def test_frozen_inputs_get_no_gradient(solver, frozen):
    def make(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        for i, parameter in enumerate(layer.parameters()):
            parameter.requires_grad_(frozen == "x" or (frozen == "some" and i % 2 == 0))
        return layer, x.requires_grad_(frozen not in ("x", "all")), sequence(seed=2)

    assert_layer_matches_bptt(make)


def test_only_the_asked_gradients_are_returned():
    def run(adjoint):
        layer, x = attention_layer(SOLVERS["reversible"], adjoint), sequence()
        grads = torch.autograd.grad(project(layer(x).value), [x, layer.f.up.bias])
        assert all(p.grad is None for p in layer.parameters())
        return list(grads)

    assert_matches_bptt(run)


@with_solver
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(solver, context):
    layer, x = attention_layer(solver, REVERSIBLE), sequence()
    recorded = layer(x)
    with context():
        plain = layer(x)
    assert torch.equal(plain.value, recorded.value)
    assert not plain.value.requires_grad
    assert recorded.value.requires_grad
    assert plain.stats.forward_nfe == recorded.stats.forward_nfe
    assert torch.equal(plain.stats.num_steps, recorded.stats.num_steps)
    assert torch.equal(plain.stats.relative_residual, recorded.stats.relative_residual)
    assert torch.equal(attention_layer(solver, BPTT)(x).value, recorded.value)


def test_eval_mode_has_a_backward_pass():
    assert_layer_matches_bptt(
        lambda adjoint: (attention_layer(SOLVERS["reversible"], adjoint, dropout=0.4).eval(), sequence())
    )


def test_transformer_layer_of_torch_in_eval_mode():
    """It has a fast path that it takes only without gradients: `forward_with_grad` keeps it on the same one."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, z, x):
            return self.layer(z + x)

    def run(adjoint):
        torch.manual_seed(0)
        layer = EquilibriumLayer(Encoder(), solver=SOLVERS["reversible"], adjoint=adjoint).eval()
        x = sequence()
        project(layer(x).value).backward()
        return gradients_of(layer, x)

    ours = run(ReversibleAdjoint(mismatch="raise", forward_with_grad=True))
    assert_equal_gradients(ours, run(BPTT))


# Inside f


@with_solver
def test_tied_parameters(solver):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 16)
            self.down = nn.Linear(16, 16)
            self.down.weight = self.up.weight

        def forward(self, z, x):
            return self.down(torch.tanh(self.up(z + x)))

    def make(adjoint):
        torch.manual_seed(0)
        layer = EquilibriumLayer(Tied(), solver=solver, adjoint=adjoint)
        assert len(list(layer.parameters())) == 3
        return layer, sequence()

    assert_layer_matches_bptt(make)


@with_solver
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_parametrized_weights(solver, cached):
    def make(adjoint):
        layer = attention_layer(solver, adjoint)
        parametrizations.weight_norm(layer.f.up)
        parametrizations.weight_norm(layer.f.qkv)
        return layer, sequence()

    with nn.utils.parametrize.cached() if cached else contextlib.nullcontext():
        assert_layer_matches_bptt(make)


def test_unused_parameter_has_no_gradient():
    def run(adjoint):
        layer, x = attention_layer(SOLVERS["momentum"], adjoint), sequence()
        layer.f.unused = nn.Parameter(torch.ones(3))
        project(layer(x).value).backward()
        grads = gradients_of(layer, x)
        assert layer.f.unused.grad is None
        return grads

    assert_matches_bptt(run)


class Nested(nn.Module):
    """f that solves an equilibrium of its own."""

    def __init__(self, solver, adjoint):
        super().__init__()
        self.inner = EquilibriumLayer(AttentionBlock(dim=16, num_heads=2, dropout=0.3), solver=solver, adjoint=adjoint)
        self.norm = nn.LayerNorm(16)

    def forward(self, z, x):
        return self.norm(x + self.inner(z).value)


@with_solver
def test_equilibrium_inside_f(solver):
    def make(adjoint):
        torch.manual_seed(0)
        return EquilibriumLayer(Nested(solver, adjoint), solver=solver, adjoint=adjoint), sequence()

    assert_layer_matches_bptt(make)


class Contracting(nn.Module):
    """With an inner equilibrium, an outer f whose fixed point every adjoint differentiates."""

    def __init__(self, solver, inner=None):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.inner = inner and EquilibriumLayer(Contracting(solver), solver=solver, adjoint=inner)

    def forward(self, z, x):
        z = self.inner(z).value if self.inner else z
        return 0.25 * torch.tanh(self.linear(z)) + x


LINEAR = AndersonSolver(max_steps=30, rtol=1e-12)
NESTED = {
    "reversible": REVERSIBLE,
    "recorded": ReversibleAdjoint(mismatch="raise", forward_with_grad=True),
    "stored": ReversibleAdjoint(mismatch="raise", stored_evaluations=2),
    "backprop": BPTT,
    "checkpointed": BackpropAdjoint(checkpoint=True),
    "implicit": ImplicitAdjoint(solver=LINEAR),
    "unrolled": PhantomAdjoint(num_steps=16, beta=1.0),
    "neumann": PhantomAdjoint(num_steps=16, beta=1.0, kind="neumann"),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("outer", NESTED.values(), ids=NESTED)
def test_equilibria_of_any_two_adjoints_nest(outer, frozen):
    """At the fixed points all gradients are that of BPTT."""

    def run(outer, inner):
        torch.manual_seed(0)
        solver = MomentumSolver(max_steps=14)
        layer = EquilibriumLayer(Contracting(solver, inner), solver=solver, adjoint=outer).requires_grad_(not frozen)
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        project(layer(x).value).backward()
        return [gradient for gradient in gradients_of(layer, x) if gradient is not None]

    reference = run(BPTT, BPTT)
    for inner in NESTED.values():
        assert_equal_gradients(run(outer, inner), reference, 1e-4)  # 14 steps leave 1e-5 of the way to it


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, z, x):
        return 0.25 * torch.tanh(self.linear(z)) + x


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("adjoint", NESTED.values(), ids=NESTED)
def test_script_as_f(adjoint):
    """The gradients of the same f as a Python module."""

    def run(is_script):
        torch.manual_seed(0)
        f = Small()
        layer = EquilibriumLayer(
            torch.jit.script(f) if is_script else f, solver=MomentumSolver(max_steps=8), adjoint=adjoint
        )
        x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        project(layer(x).value).backward()
        return gradients_of(layer, x)

    assert_equal_gradients(run(True), run(False), 1e-12)


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
        x = torch.randn(3, 4, dtype=torch.float64)
        layer.requires_grad_(not frozen)
        value = layer(x.requires_grad_(not frozen)).value
        if frozen:
            return [value.detach()]
        project(value).backward()
        return gradients_of(layer, x)

    assert_matches_bptt(run, 1e-10)


def test_gradient_hooks_fire_once():
    layer, x = attention_layer(SOLVERS["reversible"], REVERSIBLE), sequence()
    calls = {"tensor": 0, "accumulated": 0}

    def count(kind):
        calls[kind] += 1

    for parameter in layer.parameters():
        parameter.register_hook(lambda grad: count("tensor"))
        parameter.register_post_accumulate_grad_hook(lambda parameter: count("accumulated"))
    project(layer(x).value).backward()
    num_parameters = len(list(layer.parameters()))
    assert calls == {"tensor": num_parameters, "accumulated": num_parameters}
