"""What people put around and inside an equilibrium: the gradient must be that of BPTT under the same conditions."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    EquilibriumLayer,
    MomentumSolver,
    PhantomAdjoint,
    ReversibleAdjoint,
)
from tests.helpers.equilibrium import (
    ADJOINTS,
    BPTT,
    REVERSIBLE,
    SOLVERS,
    assert_equal_gradients,
    attention_layer,
    backward,
    damped_layer,
    gradients_of,
    matches_bptt,
    project,
    relative_error,
    sequence,
    with_solver,
)

# Precision


WAYS = [
    *((solver, REVERSIBLE) for solver in (SOLVERS["momentum"], SOLVERS["tolerance"])),
    *((AndersonSolver(max_steps=20), adjoint) for adjoint in ADJOINTS),
]


@pytest.mark.parametrize("where", ["backward_inside", "backward_outside", "half_precision"])
@pytest.mark.parametrize(("solver", "adjoint"), WAYS)
def test_bf16_is_as_close_to_float64_as_bptt(solver, adjoint, where):
    """Under autocast, with the backward pass inside of its region or outside, and with everything in bfloat16."""
    is_half = where == "half_precision"

    def error(adjoint):
        layer, x = damped_layer(solver, adjoint), sequence()
        wide, wide_x = copy.deepcopy(layer).double(), sequence().detach().double().requires_grad_()
        layer = layer.bfloat16() if is_half else layer
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_half):
            # A bf16 x, as the layer before makes it under autocast.
            solution = layer(x.bfloat16())
            loss = project(solution.value.float())
            if where == "backward_inside":
                loss.backward()
        if where != "backward_inside":
            loss.backward()
        assert solution.value.dtype == (torch.bfloat16 if is_half else torch.float32)
        assert not solution.stats.reconstruction_mismatch
        ours, exact = gradients_of(layer, x), backward(wide, wide_x)
        return relative_error(*(torch.cat([g.flatten().double() for g in grads]) for grads in (ours, exact)))

    bptt_error = error(BPTT)
    assert 1e-4 < bptt_error < 0.3  # bf16 is at work
    assert error(adjoint) <= 1.5 * bptt_error


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
        with Casts() as casts_back:
            loss.backward()
        gradients.append(gradients_of(layer, x))
        for casts, calls in ((forward, 7), (casts_back, 7 - stored)):
            assert casts.shapes.count(layer.f.up.weight.shape) == (1 if cache else calls)
    assert_equal_gradients(*gradients, 0.0)


@matches_bptt(3e-2)  # BPTT adds up the gradients of one cast in bf16
def test_weight_used_outside_the_solve_in_the_same_autocast_region(solver, adjoint):
    """Autocast keeps a weight's cast until the region ends: one made without gradient must not serve later."""
    layer, x = attention_layer(solver, adjoint), sequence()
    with torch.autocast("cpu", torch.bfloat16):
        before = layer.f.out(x)
        value = layer(x).value
        after = layer.f.out(value) + layer.f.qkv(value)[..., :16]
        project(before + after.float()).backward()
    return gradients_of(layer, x)


# Random numbers


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("solver", "adjoint"), WAYS)
def test_dropout_has_one_mask_a_solve(solver, adjoint, checkpointed):
    masks = []

    def run(adjoint):
        layer, x = damped_layer(solver, adjoint, dropout=0.4), sequence()
        masks.clear()
        layer.f.f.dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
        torch.manual_seed(5)
        for _ in range(2):
            if checkpointed:
                project(checkpoint(lambda x: layer(x).value, x, use_reentrant=False)).backward()
            else:
                project(layer(x).value).backward()
        return gradients_of(layer, x), torch.get_rng_state()

    (reference, state), (ours, own_state) = run(BPTT), run(adjoint)
    assert torch.equal(own_state, state)
    if adjoint is REVERSIBLE:
        assert_equal_gradients(ours, reference)
    first, half = masks[:2], len(masks) // 2
    assert len(masks) % 4 == 0
    assert half > 2 * 4
    for of_solve in (masks[:half], masks[half:]):
        assert all(torch.equal(mask, of_solve[i % 2]) for i, mask in enumerate(of_solve))  # two dropouts in the block
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


@pytest.mark.parametrize("use_reentrant", [False, True])
@with_solver
def test_torch_checkpoint_around_the_layer(solver, use_reentrant):
    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        project(checkpoint(lambda x: layer(x.cos()).value, x, use_reentrant=use_reentrant)).backward()
        return gradients_of(layer, x)

    assert_equal_gradients(run(REVERSIBLE), run(BPTT))


def test_layer_that_was_deepcopied_is_independent():
    layer, x = attention_layer(SOLVERS["momentum"], REVERSIBLE), sequence()
    expected = [gradient.clone() for gradient in backward(layer, x)[:-1]]
    twin = copy.deepcopy(layer)
    twin.zero_grad()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert_equal_gradients(backward(twin, x)[:-1], expected, 0.0)


@matches_bptt()
def test_functional_call_gives_the_gradient_of_the_exchanged_tensors(solver, adjoint):
    """The backward pass runs when the module has its own parameters back: it must use the exchanged ones."""
    layer, x = attention_layer(solver, adjoint), sequence()
    factors = [torch.full_like(p, 0.1).requires_grad_() for p in layer.parameters()]
    exchanged = {name: p.detach() + f for (name, p), f in zip(layer.named_parameters(), factors, strict=True)}
    project(torch.func.functional_call(layer, exchanged, (x,)).value).backward()
    assert all(p.grad is None for p in layer.parameters())
    return [f.grad for f in factors] + [x.grad]


@pytest.mark.parametrize("frozen", ["parameters", "some", "x", "all"])
@with_solver
def test_frozen_inputs_get_no_gradient(solver, frozen):
    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        for i, parameter in enumerate(layer.parameters()):
            parameter.requires_grad_(frozen == "x" or (frozen == "some" and i % 2 == 0))
        layer.f.unused = nn.Parameter(torch.ones(3))
        return backward(layer, x.requires_grad_(frozen not in ("x", "all")), sequence(seed=2))

    assert_equal_gradients(run(REVERSIBLE), run(BPTT))


@matches_bptt()
def test_only_the_asked_gradients_are_returned(solver, adjoint):
    layer, x = attention_layer(solver, adjoint), sequence()
    grads = torch.autograd.grad(project(layer(x).value), [x, layer.f.up.bias])
    assert all(p.grad is None for p in layer.parameters())
    return list(grads)


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


@with_solver
def test_without_gradients_the_value_is_the_same(solver):
    layer, x = attention_layer(solver, REVERSIBLE), sequence()
    recorded = layer(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            plain = layer(x)
        assert torch.equal(plain.value, recorded.value)
        assert not plain.value.requires_grad
        assert plain.stats.forward_nfe == recorded.stats.forward_nfe
        assert torch.equal(plain.stats.num_steps, recorded.stats.num_steps)
        assert torch.equal(plain.stats.relative_residual, recorded.stats.relative_residual)
    assert torch.equal(attention_layer(solver, BPTT)(x).value, recorded.value)


@pytest.mark.parametrize(
    ("adjoint", "plain", "recorded"),
    [(BackpropAdjoint(), 0, 4), (BackpropAdjoint(checkpoint=True), 4, 4), (PhantomAdjoint(num_steps=3), 4, 3)],
)
def test_flops_are_counted(adjoint, plain, recorded):
    """`plain` evaluations have no derivative; of the recorded ones the first gets a state that needs none."""
    batch, width = 3, 8
    layer = EquilibriumLayer(nn.RNNCell(width, width), solver=MomentumSolver(max_steps=4), adjoint=adjoint)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(batch, width)).value.sum().backward()
    products = 2 * (plain + recorded) + 2 * recorded + (recorded - 1)  # by two matrices, of these, and of states
    assert counter.get_total_flops() == 2 * batch * width**2 * products
