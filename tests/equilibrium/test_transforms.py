"""What torch.func, forward mode, and tracing make of a solve: what they make of a plain loop, or an error of ours."""

import contextlib
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    DivergenceError,
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from tests.helpers.equilibrium import (
    BPTT,
    PAIRS,
    REVERSIBLE,
    gradients,
    refuses,
    relative_error,
    solve,
    with_every_pair,
)

# PyTorch's own advice, when it loads its rules for forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

CHECKPOINTED = BackpropAdjoint(checkpoint=True)
UNROLLED = PhantomAdjoint(num_steps=14, beta=1.0)
REFUSED = [ImplicitAdjoint(), PhantomAdjoint(kind="neumann")]


class Map(nn.Module):
    def __init__(self, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(not frozen)

    def forward(self, z, x):
        return 0.3 * torch.tanh(self.linear(z)) + x


class Net(nn.Module):
    """Returns the value alone, as programs without Python need it."""

    def __init__(self, solver, adjoint, f=None):
        super().__init__()
        self.layer = EquilibriumLayer(f or Map(), solver=solver, adjoint=adjoint)

    def forward(self, x):
        return self.layer(x).value


class Loop(nn.Module):
    """The oracle: plain iteration, with the names of `Net`."""

    def __init__(self, frozen=False):
        super().__init__()
        self.layer = nn.Module()
        self.layer.f = Map(frozen)

    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in range(20):
            z = self.layer.f(z, x)
        return z


def normal(seed):
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, TANGENT, COTANGENT = normal(1), normal(2), normal(3)


def with_dual_numbers(net):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(X, TANGENT))).tangent


def of_the_parameters(net):
    def loss(parameters):
        return (torch.func.functional_call(net, parameters, (X,)) * COTANGENT).sum()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in net.named_parameters()})
    return torch.cat([gradient.flatten() for gradient in grads.values()])


TRANSFORMS = {
    "jvp": lambda net: torch.func.jvp(net, (X,), (TANGENT,))[1],
    "dual numbers": with_dual_numbers,
    "dual numbers, no_grad": torch.no_grad()(with_dual_numbers),
    "jacfwd": lambda net: torch.func.jacfwd(net)(X),
    "grad": lambda net: torch.func.grad(lambda x: (net(x) * COTANGENT).sum())(X),
    "vjp": lambda net: torch.func.vjp(net, X)[1](COTANGENT)[0],
    "jacrev": lambda net: torch.func.jacrev(net)(X),
    "vmap": lambda net: torch.vmap(lambda x: net(x[None])[0])(X),
    "gradients of samples": lambda net: torch.vmap(torch.func.grad(lambda x: net(x[None]).square().sum()))(X),
    "of the parameters": of_the_parameters,
}
FROZEN = ("dual numbers", "dual numbers, no_grad", "jvp", "grad", "gradients of samples")
"""Without parameters that need a gradient autograd records nothing, and a derivative could be lost."""


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    # Adjoints and solvers are chosen independently: each solver with one adjoint, each adjoint with one solver, and the
    # reversible ones, whose iteration is another here, with both of theirs and with a tolerance.
    [
        (PicardSolver(max_steps=14), BPTT),
        (RelaxedSolver(max_steps=20), UNROLLED),
        (MomentumSolver(max_steps=22, arithmetic="float64"), CHECKPOINTED),
        (AndersonSolver(max_steps=11), BPTT),
        (AndersonSolver(max_steps=16, rtol=1e-13), CHECKPOINTED),
        (BroydenSolver(max_steps=12), UNROLLED),
        (MomentumSolver(max_steps=22), REVERSIBLE),
        (ReversibleSolver(max_steps=16, rtol=1e-9), REVERSIBLE),
        *((MomentumSolver(max_steps=8), adjoint) for adjoint in REFUSED),
    ],
    ids=str,
)
def test_derivatives_are_those_of_a_plain_loop_or_refused(solver, adjoint):
    for frozen, names in ((False, TRANSFORMS), (True, FROZEN)):
        for name in names:
            net, loop = Net(solver, adjoint, Map(frozen)), Loop(frozen)
            if adjoint in REFUSED:
                with refuses(RuntimeError, f"{type(adjoint).__name__} has no", "torch.func", "BackpropAdjoint()"):
                    TRANSFORMS[name](net)
                continue
            ours, reference = TRANSFORMS[name](net).detach(), TRANSFORMS[name](loop).detach()
            assert reference.norm() > 0.1
            # What is left of the distance to the fixed point after so few steps; the exact state is rounded to 2^-32.
            assert relative_error(ours, reference) <= 1e-6, name


ACCELERATED = [AndersonSolver(max_steps=11), BroydenSolver(max_steps=12)]


@pytest.mark.parametrize("solver", [MomentumSolver(max_steps=22), *ACCELERATED], ids=str)
def test_second_derivatives(solver):
    """`hessian` is forward mode over reverse mode."""
    nets = Net(solver, BPTT), Loop()
    ours, reference = (torch.func.hessian(lambda x, net=net: net(x).square().sum())(X[:1]) for net in nets)
    assert relative_error(ours, reference) <= 1e-6  # Broyden's pairs are noise at the end


def test_truncated_backpropagation_is_the_same_in_both_modes():
    net = Net(MomentumSolver(max_steps=8), BackpropAdjoint(num_evaluations=2))
    assert relative_error(torch.func.jacfwd(net)(X), torch.func.jacrev(net)(X)) <= 1e-12
    x = X.clone().requires_grad_()
    plain = torch.autograd.grad((net(x) * COTANGENT).sum(), x)[0]
    assert relative_error(TRANSFORMS["grad"](net), plain) <= 1e-12


def test_an_ensemble_by_vmap_over_stacked_parameters():
    nets = [Net(MomentumSolver(max_steps=8), ReversibleAdjoint()) for _ in range(3)]
    with torch.no_grad():
        for k, net in enumerate(nets):
            net.layer.f.linear.weight.mul_(k)
    parameters, buffers = torch.func.stack_module_state(nets)
    values = torch.vmap(lambda p, b: torch.func.functional_call(nets[0], (p, b), (X,)))(parameters, buffers)
    (values * COTANGENT).sum().backward()
    for k, net in enumerate(nets):
        value = net(X)
        assert torch.equal(values[k], value)
        (value * COTANGENT).sum().backward()
        assert all(relative_error(parameters[name].grad[k], p.grad) <= 1e-12 for name, p in net.named_parameters())


def test_f_that_works_in_place_under_vmap():
    class InPlace(Map):
        def forward(self, z, x):
            z.mul_(0.5)
            return super().forward(z, x.add_(1))

    class Copying(Map):
        def forward(self, z, x):
            return super().forward(0.5 * z, x + 1)

    for solver in (PicardSolver(max_steps=3), MomentumSolver(max_steps=3)):
        for name in ("vmap", "grad", "jacfwd"):
            ours, twin = (TRANSFORMS[name](Net(solver, BPTT, f)) for f in (InPlace(), Copying()))
            assert torch.equal(ours, twin)


MANY = {
    "is_grads_batched": lambda value, x, g: torch.autograd.grad(value, x, g, is_grads_batched=True)[0],
    "vmap": lambda value, x, g: torch.vmap(lambda g: torch.autograd.grad(value, x, g, retain_graph=True)[0])(g),
}


@pytest.mark.parametrize("way", MANY)
@pytest.mark.parametrize(
    "adjoint",
    [BPTT, CHECKPOINTED, REVERSIBLE, UNROLLED, *REFUSED, BackpropAdjoint(num_evaluations=3)],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_many_gradients_at_once(adjoint, way):
    net, x = Net(MomentumSolver(max_steps=16), adjoint), X.clone().requires_grad_()
    cotangents = torch.stack([COTANGENT, TANGENT])
    value = net(x)
    if isinstance(adjoint, ImplicitAdjoint) or (adjoint is REVERSIBLE and way == "vmap"):
        with refuses(RuntimeError, f"{type(adjoint).__name__} has no gradient", "many outputs", "Backprop"):
            MANY[way](value, x, cotangents)
        return
    one_by_one = [torch.autograd.grad(net(x), x, g)[0] for g in cotangents]
    assert relative_error(MANY[way](value, x, cotangents), torch.stack(one_by_one)) <= 1e-12


def test_divergence_under_a_transform_is_nan():
    """There the host cannot look; a state beyond the range of the exact state must not pass for a value."""
    net, far = Net(MomentumSolver(max_steps=3), BPTT), X * 1e7
    with pytest.raises(DivergenceError):
        net(far)
    assert torch.vmap(lambda x: net(x[None])[0])(far).isnan().all()
    assert torch.func.jvp(net, (far,), (TANGENT,))[0].isnan().all()


# Programs without Python


@with_every_pair
def test_vmap_without_gradients_works_with_every_adjoint(solver, adjoint):
    net = Net(solver, adjoint)
    with torch.no_grad():
        assert relative_error(TRANSFORMS["vmap"](net), net(X)) <= 1e-12


@with_every_pair
def test_shapes_without_numbers(solver, adjoint):
    """With fake tensors, for estimates of memory and cost."""
    net = Net(solver, adjoint)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net(mode.from_tensor(X)).shape == X.shape


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("momentum-reversible", torch.no_grad),
        ("reversible-reversible-tolerance", contextlib.nullcontext),
        ("anderson-implicit", contextlib.nullcontext),
    ],
)
def test_exported_program_has_the_value_of_any_batch(name, context):
    net, x = Net(*PAIRS[name]).eval(), X.clone().requires_grad_()
    batch = torch.export.Dim("batch", min=2, max=64)
    with context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        program = torch.export.export(net, (X,), dynamic_shapes=({0: batch},)).module()
    for other in (X, normal(7), torch.cat([X, normal(7)])):
        with torch.no_grad():
            assert relative_error(program(other), net(other)) <= 1e-12
    assert not program(x).requires_grad  # rather than a gradient of zero, that of the rounding
    if name != "anderson-implicit":
        assert program(X * 1e7).isnan().all()


@pytest.mark.parametrize("name", ["momentum-reversible", "relaxed-backprop-tolerance", "broyden-implicit-tolerance"])
def test_recorded_and_traced_operations_give_the_value(name):
    net = Net(*PAIRS[name]).eval()
    with pytest.raises(ValueError, match=r"make_fx.*no_grad"):
        make_fx(net)(X)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `trace` is deprecated
        for program in (make_fx(net)(X), torch.jit.trace(net, X)):
            assert torch.equal(program(normal(7)), net(normal(7)))


def test_training_mode_is_not_exported():
    """Its dropout would draw a mask for every evaluation."""
    for export in (lambda net: torch.export.export(net, (X,)), lambda net: make_fx(net)(X)):
        with pytest.raises(Exception, match=r"evaluation mode.*\.eval\(\)"):
            export(Net(MomentumSolver(max_steps=3), ReversibleAdjoint()))


def test_scripts_are_refused():
    for script in (torch.jit.script, torch.fx.symbolic_trace):
        with pytest.raises((RuntimeError, ValueError), match=r"EquilibriumLayer.*torch\.(export|fx\.Tracer)"):
            script(Net(MomentumSolver(max_steps=3), ReversibleAdjoint()))


def test_gradients_outside_of_transforms_are_untouched():
    """Also within a level that nothing of the solve takes part in."""
    f, x, solver = Map(), X.clone().requires_grad_(), ReversibleSolver(max_steps=3)
    expected = gradients(solve(f, x, solver, REVERSIBLE).value, x, *f.parameters())
    with forward_ad.dual_level():
        ours = gradients(solve(f, x, solver, REVERSIBLE).value, x, *f.parameters())
    assert relative_error(ours, expected) <= 1e-12
